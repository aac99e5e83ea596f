"""The norm: an autograd function over plain torch, counted so that a test can see that it ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CALLS: Counter[str] = Counter()


def build_norm(options: object) -> Callable[..., Tensor]:
    return rms_norm


def is_supported(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    return dtype in (torch.float32, torch.float64, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool, dtype: torch.dtype | None) -> Tensor:
    CALLS["forward"] += 1
    return _Norm.apply(x, weight, eps, offset, rounded, dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool, dtype: torch.dtype | None
    ) -> Tensor:
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        row = wide * inverse
        if rounded:
            result = row.to(x.dtype) * (weight + offset if offset else weight)
        else:
            result = (row * (weight + offset).to(row.dtype)).to(x.dtype)
        return result if dtype is None else result.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        CALLS["backward"] += 1
        x, weight, inverse = ctx.saved_tensors
        row = x.to(inverse.dtype) * inverse
        wide = grad.to(inverse.dtype)
        scaled = wide * (weight.to(inverse.dtype) + ctx.offset)
        found = inverse * (scaled - row * (scaled * row).mean(-1, keepdim=True))
        over = tuple(range(x.dim() - 1))
        own = (wide * row).sum(over).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return found.to(x.dtype), own, None, None, None, None
