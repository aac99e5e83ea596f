"""The kernels as formulas, for a compiler that makes one pass of each; see `kernels.Kernels` for what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
SQRT_2_OVER_PI = 0.7978845608028654
CUBIC = 0.044715  # the constant of gelu's tanh approximation


def compute_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, rounded: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(torch.float32, total.dtype))
    rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # [R, 1]
    row = wide * rms
    if rounded:
        row = row.to(total.dtype).to(row.dtype)
    return total, (row * (weight.to(row.dtype) + offset)).to(dtype), rms


def compute_norm_gradient(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    rms: Tensor,
    weight: Tensor,
    offset: float,
) -> Tensor:
    wide, scaled = total.to(rms.dtype), grad.to(rms.dtype) * (weight.to(rms.dtype) + offset)
    row = wide * rms
    result = rms * (scaled - row * (scaled * row).mean(-1, keepdim=True))
    if grad_total is not None:
        result = result + grad_total
    return result.to(total.dtype)


def weight_backward(grad: Tensor, total: Tensor, rms: Tensor, rounded: bool) -> Tensor:
    """Return [H] in the dtype of the norm: of its weight, summed over the rows."""
    row = total.to(rms.dtype) * rms
    if rounded:
        row = row.to(total.dtype).to(rms.dtype)
    return (grad.to(rms.dtype) * row).sum(0)


def turn_positions(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    half = x.shape[-1] // 2
    low, high = x[..., :half].float(), x[..., half:].float()
    turned_low = low * cos[..., :half].float() - high * sin[..., :half].float()
    turned_high = high * cos[..., half:].float() + low * sin[..., half:].float()
    return torch.cat((turned_low, turned_high), -1).to(dtype)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate.float()
    return (wide * _sigmoid(wide) * up.float()).to(gate.dtype)


def silu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide, grad_wide = gate.float(), grad.float()
    share = _sigmoid(wide)
    act = wide * share
    slope = share + act * (1.0 - share)
    return (grad_wide * up.float() * slope).to(gate.dtype), (grad_wide * act).to(up.dtype)


def gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate.float()
    return (wide * _sigmoid(_gelu_inner(wide)) * up.float()).to(gate.dtype)


def gelu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide, grad_wide = gate.float(), grad.float()
    share = _sigmoid(_gelu_inner(wide))
    act = wide * share
    inner_slope = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * wide * wide)
    slope = share + act * (1.0 - share) * inner_slope
    return (grad_wide * up.float() * slope).to(gate.dtype), (grad_wide * act).to(up.dtype)


def _sigmoid(x: Tensor) -> Tensor:
    """By a power of two, which processors have in fewer instructions than the exponential: a sixth of the pass less."""
    return 1.0 / (1.0 + torch.exp2(x * -LOG2E))


def _gelu_inner(x: Tensor) -> Tensor:
    """u with gelu(x) = x sigmoid(u): 0.5 (1 + tanh(u / 2)) is sigmoid(u)."""
    return 2.0 * SQRT_2_OVER_PI * (x + CUBIC * x * x * x)
