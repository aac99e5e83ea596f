"""The operations as autograd functions over a set of kernels: what each keeps for backward, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.model.operations import reference
from luthier.model.operations.kernels import Gate, Kernels, NormForm
from luthier.model.operations.signatures import Implementation, Predicate


def list_implementations(name: str, kernels: Kernels, supports: Predicate) -> Iterator[Implementation]:
    """Yield every operation over one set of kernels."""
    for operation in (rms_norm, add_rms_norm, rope, swiglu, geglu):
        function = functools.partial(operation, kernels)
        yield Implementation(operation=operation.__name__, name=name, function=function, supports=supports)


def rms_norm(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    rounded: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    form = NormForm(eps=eps, offset=offset, rounded=rounded, dtype=dtype)
    return _Norm.apply(kernels, form, x, None, weight)[1]


def add_rms_norm(
    kernels: Kernels,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    rounded: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    form = NormForm(eps=eps, offset=offset, rounded=rounded, dtype=dtype)
    if residual is not None and residual.shape != x.shape:
        return reference.add_rms_norm(x, residual, weight, eps, offset, rounded, dtype)
    return _Norm.apply(kernels, form, x, residual, weight)


def rope(
    kernels: Kernels, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    if cos.requires_grad or sin.requires_grad:  # nobody trains the angles, but their gradient must not be lost silently
        return reference.rope(query, key, cos, sin, dtype)
    return _Turn.apply(kernels, query, cos, sin, dtype), _Turn.apply(kernels, key, cos, sin, dtype)


def swiglu(kernels: Kernels, gate: Tensor, up: Tensor) -> Tensor:
    return _gated(kernels, gate, up, "silu")


def geglu(kernels: Kernels, gate: Tensor, up: Tensor) -> Tensor:
    return _gated(kernels, gate, up, "gelu")


def _gated(kernels: Kernels, gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    if gate.dtype is not up.dtype or gate.shape != up.shape:
        return getattr(reference, {"silu": "swiglu", "gelu": "geglu"}[kind])(gate, up)
    return _Gated.apply(kernels, kind, gate, up)


class _Norm(torch.autograd.Function):
    """(total, norm). Keeps the total, which the residual stream holds anyway, and one number for each row."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, form: NormForm, x: Tensor, residual: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        flat = None if residual is None else _rows(residual)
        total, result, rms = kernels.norm(_rows(x), flat, weight, form)
        total = x if residual is None else total.view(x.shape)
        ctx.save_for_backward(total, rms, weight)
        ctx.kernels, ctx.form, ctx.dtypes = kernels, form, (x.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        return total, result.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> tuple[Any, ...]:
        total, rms, weight = ctx.saved_tensors
        grad_x, grad_weight = grad_total, None
        if grad is not None:
            through = None if grad_total is None else _rows(grad_total)
            options = ctx.form, ctx.needs_input_grad[4]
            grad_x, grad_weight = ctx.kernels.norm_backward(_rows(grad), through, _rows(total), rms, weight, *options)
            grad_x = grad_x.view(total.shape)
        own, other = (None if dtype is None or grad_x is None else grad_x.to(dtype) for dtype in ctx.dtypes)
        return None, None, own, other, grad_weight


class _Turn(torch.autograd.Function):
    """One of query and key, turned. The gradient is turned back; the tables are kept, which every layer shares."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels, ctx.dtype = kernels, x.dtype
        return _turned(kernels, x, cos, sin, dtype or torch.promote_types(x.dtype, cos.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        back = -sin.roll(sin.shape[-1] // 2, -1)  # the gradient of each half passes through the sine of the other
        return None, _turned(ctx.kernels, grad, cos, back, ctx.dtype), None, None, None


class _Gated(torch.autograd.Function):
    """act(gate) up. Keeps both and computes act again: [T, F] is the widest of a layer's tensors."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, kind: Gate, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels, ctx.kind = kernels, kind
        return kernels.gated(_rows(gate), _rows(up), kind).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        grads = ctx.kernels.gated_backward(_rows(grad), _rows(gate), _rows(up), ctx.kind)
        return None, None, grads[0].view(gate.shape), grads[1].view(gate.shape)


def _rows(x: Tensor) -> Tensor:
    """Return x [..., H] as contiguous rows [R, H]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _turned(kernels: Kernels, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply the function to [B, heads, T, D] as [B T, heads, D], the order in which products leave heads in memory."""
    batch, heads, tokens, size = x.shape
    tables = [table.expand(batch, tokens, size).reshape(-1, 1, size) for table in (cos, sin)]
    turned = kernels.turn(x.transpose(1, 2).reshape(-1, heads, size), *tables, dtype)
    return turned.view(batch, tokens, heads, size).transpose(1, 2)
