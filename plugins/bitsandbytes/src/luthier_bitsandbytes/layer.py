"""The linear layer with a weight in one of bitsandbytes' formats, which it dequantizes for each product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from luthier_bitsandbytes.library import functional as bnb

NESTED = 256  # scales that share a scale, as in bitsandbytes
SCALES = ("absmax", "nested_absmax", "nested_offset")


@attrs.frozen(kw_only=True)
class Form:
    """The format `nf4`, `fp4` or `int8`, the weights of a block, and whether scales are nested."""

    kind: str
    block_size: int = 64
    nested: bool = False


class BnbLinear(nn.Module):
    """A linear layer with a frozen weight [out, in] in buffers. Its bias is exact.

    4 bits: `weight` is uint8 [ceil(out in / 2), 1], `absmax` one scale for each block of the flattened weight, nested
    or not. int8: `weight` is int8 [out, in], `absmax` the largest magnitude of each row.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, layer: nn.Linear | Conv1D, form: Form) -> None:
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)
        shape = layer.weight.shape[::-1] if self.transposed else layer.weight.shape
        self.out_features, self.in_features = shape
        self.form, self.stored = form, layer.weight.dtype
        self.bias: nn.Parameter | None
        self.register_parameter("bias", layer.bias)
        for name, tensor in self._empty(layer.weight.device).items():
            self.register_buffer(name, tensor)
        self.train(layer.training)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Quantize a weight [out, in] into the buffers, in float32."""
        weight = weight.detach().to(torch.float32).contiguous()
        if self.form.kind == "int8":
            codes, scales, _ = bnb.int8_vectorwise_quant(weight)
            self._hold(codes, scales, None, None)
            return
        packed, state = bnb.quantize_4bit(
            weight.view(1, -1),
            blocksize=self.form.block_size,
            quant_type=self.form.kind,
            compress_statistics=self.form.nested,
        )
        nested = state.state2.absmax if self.form.nested else None
        self._hold(packed, state.absmax, nested, state.offset if self.form.nested else None)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in].

        bitsandbytes gets it as one flattened row: of several rows, those that end within a block get a wrong scale on
        processors with AVX-512 (bitsandbytes 0.50.2).
        """
        shape = (self.out_features, self.in_features)
        if self.form.kind == "int8":
            return (self.weight * (self.absmax[:, None] / 127)).to(dtype)
        flat = torch.ops.bitsandbytes.dequantize_4bit(
            self.weight, self._scales(), self.form.block_size, self.form.kind, (1, shape[0] * shape[1]), dtype
        )
        return flat.view(shape)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., in] to [..., out], in the dtype of the states or of autocast."""
        kind = states.device.type
        if torch.is_autocast_enabled(kind):
            states = states.to(torch.get_autocast_dtype(kind))
        output = _Multiply.apply(states, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form.kind}"

    def _scales(self) -> Tensor:
        if not self.form.nested:
            return self.absmax
        assert self.nested_absmax is not None and self.nested_offset is not None
        code = _nested_map(str(self.absmax.device))
        opened = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax, self.nested_absmax, code, NESTED, torch.float32
        )
        return opened + self.nested_offset

    def _empty(self, device: torch.device) -> dict[str, Tensor | None]:
        total, nested = self.out_features * self.in_features, self.form.nested
        if self.form.kind == "int8":
            codes = torch.zeros(self.out_features, self.in_features, dtype=torch.int8, device=device)
            return {"weight": codes, "absmax": torch.zeros(self.out_features, device=device)} | dict.fromkeys(
                SCALES[1:]
            )
        blocks = -(-total // self.form.block_size)
        return {
            "weight": torch.zeros(-(-total // 2), 1, dtype=torch.uint8, device=device),
            "absmax": torch.zeros(blocks, dtype=torch.uint8 if nested else torch.float32, device=device),
            "nested_absmax": torch.zeros(-(-blocks // NESTED), device=device) if nested else None,
            "nested_offset": torch.zeros((), device=device) if nested else None,
        }

    def _hold(self, weight: Tensor, *scales: Tensor | None) -> None:
        self.weight.copy_(weight)
        for name, made in zip(SCALES, scales, strict=True):
            if made is not None:
                getattr(self, name).copy_(made)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move every tensor, but keep the scales in float32 when the dtype changes, as in `model.bfloat16()`."""
        before = {name: getattr(self, name) for name in SCALES}
        super()._apply(fn, recurse)
        for name, scales in before.items():
            moved_scales = getattr(self, name)
            if moved_scales is not None and moved_scales.dtype != scales.dtype:
                setattr(self, name, scales.to(moved_scales.device))
        return self


class _Multiply(torch.autograd.Function):
    """The product with a frozen weight, which is dequantized again in backward and not kept between."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: BnbLinear) -> Tensor:
        ctx.layer = layer
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states, layer.dense(states.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ ctx.layer.dense(gradient.dtype), None


_MAPS: dict[str, Tensor] = {}


def _nested_map(device: str) -> Tensor:
    """Return the 256 values to which nested scales are rounded."""
    if device not in _MAPS:
        _MAPS[device] = bnb.create_dynamic_map().to(device)
    return _MAPS[device]
