"""The passes over memory that operations consist of, without gradient, as few as torch's own kernels allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

Gate = Literal["silu", "gelu"]


@attrs.frozen(kw_only=True)
class NormForm:
    """Which norm it is; see `reference.rms_norm`."""

    eps: float
    offset: float = 0.0
    rounded: bool = True
    dtype: torch.dtype | None = None


@attrs.frozen(kw_only=True)
class Kernels:
    """One set of passes. Rows are contiguous [R, H] or [R, F]; heads [R, heads, D], their tables [R, 1, D].

    norm(x, residual, weight, form) -> (x + residual, its norm, the rows' 1 / rms [R, 1])
    norm_backward(grad, grad_total, total, rms, weight, form, wants_weight) -> (of total, of weight or None)
    turn(x, cos, sin, dtype) -> x turned: x cos + (-high, low) sin over the halves of a head
    gated(gate, up, kind) -> act(gate) up;  gated_backward(grad, gate, up, kind) -> (of gate, of up)
    """

    norm: Callable[..., tuple[Tensor, Tensor, Tensor]]
    norm_backward: Callable[..., tuple[Tensor, Tensor | None]]
    turn: Callable[..., Tensor]
    gated: Callable[..., Tensor]
    gated_backward: Callable[..., tuple[Tensor, Tensor]]


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return what a norm is computed in."""
    return torch.promote_types(torch.float32, x.dtype)


def norm_kernel(x: Tensor, residual: Tensor | None, weight: Tensor, form: NormForm) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.to(wide_dtype(total))
    rms = _dots(wide, wide).div_(wide.shape[-1]).add_(form.eps).rsqrt_()[:, None]  # [R, 1]
    row = wide * rms if wide is total else wide.mul_(rms)
    scale = weight + form.offset if form.offset else weight
    if form.rounded:
        row = row.to(total.dtype)
        result = row.mul_(scale) if scale.dtype is row.dtype else row * scale
    else:
        result = row.mul_(scale.to(row.dtype)).to(total.dtype)
    return total, result if form.dtype is None else result.to(form.dtype), rms


def norm_gradient_kernel(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    rms: Tensor,
    weight: Tensor,
    form: NormForm,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """With m = grad * scale: (m - row mean(m row)) / rms, where row = total / rms."""
    wide = total.to(rms.dtype)
    grad = grad.to(rms.dtype)
    grad_weight = None
    if wants_weight:
        row = wide * rms
        row = row.to(total.dtype) if form.rounded else row
        grad_weight = (grad * row).sum(0).to(weight.dtype)
    scale = weight + form.offset if form.offset else weight
    scaled = grad * scale.to(rms.dtype)
    along = _dots(scaled, wide)[:, None].mul_(rms.pow(3)).div_(wide.shape[-1])  # [R, 1]
    result = scaled.mul_(rms).addcmul_(wide, along, value=-1)
    if grad_total is not None:
        result = result.add_(grad_total)
    return result.to(total.dtype), grad_weight


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the dot products [R] of rows, not as a matrix product, which autocast would round."""
    with torch.autocast(left.device.type, enabled=False):
        return torch.linalg.vecdot(left, right)


def turn_kernel(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    half = x.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # with these signs the halves need only be swapped
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    return torch.roll(wide, half, -1).mul_(signed).addcmul_(wide, cos).to(dtype)


def gated_product(gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    return _activated(gate, kind).mul_(up)


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: Gate) -> tuple[Tensor, Tensor]:
    through = grad * up
    if kind == "silu":
        through = torch.ops.aten.silu_backward(through, gate)
    else:
        through = torch.ops.aten.gelu_backward(through, gate, approximate="tanh")
    return through, _activated(gate, kind).mul_(grad)


def _activated(gate: Tensor, kind: Gate) -> Tensor:
    return F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")


EAGER: Final = Kernels(
    norm=norm_kernel,
    norm_backward=norm_gradient_kernel,
    turn=turn_kernel,
    gated=gated_product,
    gated_backward=gated_backward,
)
