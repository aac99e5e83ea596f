"""The linear layer with a weight in torchao's int8 or int4, which it dequantizes for each product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from luthier_torchao.library import EVEN, INT4, MAPPINGS, ROWS, Int8, IntX


@attrs.frozen(kw_only=True)
class Form:
    """The bits of a code, 8 or 4; for 4 the weights of a group and how its codes lie."""

    bits: int
    group_size: int = 32
    mapping: str = "asymmetric"


class TorchaoLinear(nn.Module):
    """A linear layer with a frozen weight [out, in] in buffers. Its bias is exact.

    int8: `weight` is int8 [out, in], `scale` float32 [out, 1]. int4: `weight` is uint8 [out, columns / 2] of two codes
    each, the even column in the low bits, where `columns` is `in` up to a multiple of the group; `scale` float32 and
    `zero` int8 are [out, groups]. A weight is (code - zero) times its scale.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None

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
        """Quantize a weight [out, in] into the buffers by torchao, in float32."""
        weight = weight.detach().to(torch.float32).contiguous()
        if not weight.numel():
            return
        if self.form.bits == 8:
            made = Int8.from_hp(weight, granularity=ROWS, mapping_type=EVEN)
            self.weight.copy_(made.qdata)
            self.scale.copy_(made.scale)
            return
        group = self.form.group_size
        padded = nn.functional.pad(weight, (0, -self.in_features % group))
        made = IntX.from_hp(padded, (1, group), INT4, mapping_type=MAPPINGS[self.form.mapping])
        self.weight.copy_(pack_codes(made.qdata))
        self.scale.copy_(made.scale.view(self.scale.shape))
        assert self.zero is not None
        self.zero.copy_(made.zero_point.view(self.zero.shape))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in], computed in float32."""
        if self.zero is None:
            return (self.weight * self.scale).to(dtype)
        codes = open_codes(self.weight).view(*self.scale.shape, self.form.group_size)
        opened = (codes - self.zero[..., None]) * self.scale[..., None]
        return opened.view(self.out_features, -1)[:, : self.in_features].to(dtype)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., in] to [..., out], in the dtype of the states or of autocast."""
        kind = states.device.type
        if torch.is_autocast_enabled(kind):
            states = states.to(torch.get_autocast_dtype(kind))
        output = _Multiply.apply(states, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int{self.form.bits}"

    def _empty(self, device: torch.device) -> dict[str, Tensor | None]:
        rows, columns = self.out_features, self.in_features
        if self.form.bits == 8:
            codes = torch.zeros(rows, columns, dtype=torch.int8, device=device)
            return {"weight": codes, "scale": torch.zeros(rows, 1, device=device), "zero": None}
        groups = -(-columns // self.form.group_size)
        return {
            "weight": torch.zeros(rows, groups * self.form.group_size // 2, dtype=torch.uint8, device=device),
            "scale": torch.zeros(rows, groups, device=device),
            "zero": torch.zeros(rows, groups, dtype=torch.int8, device=device),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move every tensor, but keep the scales in float32 when the dtype changes, as in `model.bfloat16()`."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self


def pack_codes(codes: Tensor) -> Tensor:
    """Return codes from -8 to 7, int8 [..., n], two in a byte: uint8 [..., n / 2], the even one in the low bits."""
    shifted = (codes + 8).to(torch.uint8)
    return shifted[..., ::2] | (shifted[..., 1::2] << 4)


def open_codes(packed: Tensor) -> Tensor:
    """Return the codes, int8 [..., n], that `pack_codes` packed."""
    pairs = torch.stack([packed & 15, packed >> 4], -1).to(torch.int8) - 8
    return pairs.flatten(-2)


class _Multiply(torch.autograd.Function):
    """The product with a frozen weight, which is dequantized again in backward and not kept between."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: TorchaoLinear) -> Tensor:
        ctx.layer = layer
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states, layer.dense(states.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ ctx.layer.dense(gradient.dtype), None
