"""The linear layer with a 4-bit weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from luthier_kernels import FourBitWeight, lend_fourbit, multiply_fourbit
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SCALES = ("absmax", "nested_absmax", "nested_offset")


@attrs.frozen(kw_only=True)
class Format:
    """The format of a weight: `nf4` or `fp4`, the weights of a block, and whether scales are nested."""

    kind: str
    block_size: int
    nested: bool


class FourBitLinear(nn.Module):
    """A linear layer with a frozen 4-bit weight [out, in] in buffers. Its bias is exact.

    `weight` is uint8 [ceil(out in / 2), 1], `absmax` one scale for each block: float32, or uint8 with
    `nested_absmax` and `nested_offset`. `stored` is the dtype that the weight had. `transposed` is True if the layer
    replaces transformers' Conv1D, whose own weight is [in, out].
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, layer: nn.Linear | Conv1D, form: Format) -> None:
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)
        shape = layer.weight.shape[::-1] if self.transposed else layer.weight.shape
        self.out_features, self.in_features = shape
        self.form, self.stored = form, layer.weight.dtype
        self.bias: nn.Parameter | None
        self.register_parameter("bias", layer.bias)
        device, total = layer.weight.device, self.out_features * self.in_features
        blocks = -(-total // form.block_size)
        self._hold("weight", torch.zeros(-(-total // 2), 1, dtype=torch.uint8, device=device))
        scales = torch.uint8 if form.nested else torch.float32
        self._hold("absmax", torch.zeros(blocks, dtype=scales, device=device))
        self._hold("nested_absmax", torch.zeros(-(-blocks // 256), device=device) if form.nested else None)
        self._hold("nested_offset", torch.zeros((), device=device) if form.nested else None)
        self.train(layer.training)

    def put(self, weight: Tensor) -> None:
        """Quantize a weight [out, in] into the buffers."""
        made = FourBitWeight.from_weight(weight, self.form.kind, self.form.block_size, self.form.nested)
        self.weight.copy_(made.packed.view(-1, 1))
        for name, scales in zip(SCALES, (made.scales, made.nested, made.offset), strict=True):
            if scales is not None:
                getattr(self, name).copy_(scales)

    def held(self) -> FourBitWeight:
        """Return the weight with its scales and format. Its tensors are the buffers."""
        return FourBitWeight(
            packed=self.weight.view(-1),
            scales=self.absmax,
            shape=(self.out_features, self.in_features),
            dtype=self.stored,
            kind=self.form.kind,
            block_size=self.form.block_size,
            nested=self.nested_absmax,
            offset=self.nested_offset,
        )

    def dense(self) -> Tensor:
        """Return the weight [out, in] in float32."""
        return self.held().dequantize()

    def lend_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in memory that the next call, of any such layer, overwrites."""
        return lend_fourbit(self.held().arguments(), dtype)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., in] to [..., out], in the dtype of the states or of autocast."""
        output = multiply_fourbit(states, self.held().arguments())
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        form = f"{self.form.kind}, block_size={self.form.block_size}, nested={self.form.nested}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {form}"

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move every tensor, but keep the scales in float32 when the dtype changes, as in `model.bfloat16()`."""
        before = {name: getattr(self, name) for name in SCALES}
        super()._apply(fn, recurse)
        for name, scales in before.items():
            moved_scales = getattr(self, name)
            if moved_scales is not None and moved_scales.dtype != scales.dtype:
                setattr(self, name, scales.to(moved_scales.device))
        return self
