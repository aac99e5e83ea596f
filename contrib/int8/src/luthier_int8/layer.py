"""The linear layer with an int8 weight, which it dequantizes for each product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from luthier_int8 import arithmetic


class Int8Linear(nn.Module):
    """A linear layer whose `weight` [out, in] int8 and `scales` [out, groups] float32 are buffers. Its bias is exact.

    `transposed` is True if it replaces transformers' Conv1D, whose own weight is [in, out].
    """

    weight: Tensor
    scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: nn.Parameter | None = None,
        group_size: int | None = None,
        transposed: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size, self.transposed = group_size, transposed
        groups = -(-in_features // (group_size or in_features))
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(out_features, groups, dtype=torch.float32, device=device))
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, layer: nn.Linear | Conv1D, group_size: int | None = None) -> Int8Linear:
        """Return the int8 layer that replaces a dense one, with its bias and mode."""
        transposed = isinstance(layer, Conv1D)
        weight = layer.weight.T if transposed else layer.weight  # [out, in]
        made = cls(
            weight.shape[1],
            weight.shape[0],
            bias=layer.bias,
            group_size=group_size,
            transposed=transposed,
            device=weight.device,
        )
        made.put(weight)
        return made.train(layer.training)

    def put(self, weight: Tensor) -> None:
        """Quantize a weight [out, in] into the buffers."""
        codes, scales = arithmetic.quantize(weight, self.group_size)
        self.weight.copy_(codes)
        self.scales.copy_(scales)

    def dense(self) -> Tensor:
        """Return the weight [out, in] in float32."""
        return arithmetic.dequantize(self.weight, self.scales, self.group_size)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., in] to [..., out], in the dtype of the states or of autocast."""
        kind = states.device.type
        if torch.is_autocast_enabled(kind):
            states = states.to(torch.get_autocast_dtype(kind))
        output = _Product.apply(states, self.weight, self.scales, self.group_size)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{groups}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Move every tensor, but keep the scales in float32 when the dtype changes, as in `model.bfloat16()`."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        return self


class _Product(torch.autograd.Function):
    """states @ weight.T. Backward dequantizes the weight again, so that only int8 is kept between the passes."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, codes: Tensor, scales: Tensor, group_size: int | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.group_size = group_size
        return F.linear(states, arithmetic.dequantize(codes, scales, group_size).to(states.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scales = ctx.saved_tensors
        weight = arithmetic.dequantize(codes, scales, ctx.group_size)
        return gradient @ weight.to(gradient.dtype), None, None, None
