"""The product with a frozen matrix and its change within two subspaces as one operation, which keeps little."""

from __future__ import annotations

from typing import Any

import torch
from luthier import find_source
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def changed_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor, core: Tensor | None, outer: Tensor
) -> Tensor:
    """Return x (W + U C V^T)^T + bias, [..., out]. x is [..., in], W [out, in], V [in, v], C [u, v], U [out, u].

    W and the bias are frozen, and without C, U V^T is the change. U C V^T is never formed, and its product is added
    into that of W, as its gradient is into that of W. W and factors are cast to the dtype of x; W is kept so for
    backward, as autocast keeps it, and gradients have the dtype of what they belong to. x is kept, or computed again if
    it has a source, only if V trains, and x V is kept only if C or U trains.
    """
    return _Changed.apply(x, weight, bias, inner, core, outer, find_source(x))


def composed_product(x: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor, outer: Tensor) -> Tensor:
    """Return x (W + U V^T)^T + bias as `changed_product` does without C, but from the sum of both matrices.

    U V^T is computed in the dtype of x, and the sum in the wider one of W. It is rounded to that of x only then, as a
    weight that trains in full is, and is kept for backward in the place of W.
    """
    return _Composed.apply(x, weight, bias, inner, outer, find_source(x))


def token_factor(x: Tensor, rows: int, columns: int) -> float:
    """Return how many multiplications the tokens of x take by U and V, for each that forming U V^T takes."""
    return x.numel() // x.shape[-1] * (rows + columns) / (rows * columns)


def computes_product(layer: nn.Module, x: Tensor) -> bool:
    """Return True if the layer's forward is the product with a frozen dense weight alone, and nothing hooks into it."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer) is not nn.Linear or hooked or "forward" in vars(layer) or not x.is_floating_point():
        return False
    frozen = not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    return frozen and layer.weight.is_floating_point() and layer.weight.element_size() > 1


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies: autocast's, otherwise that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Any) -> Tensor:
        inner, core, outer, source = factors
        dtype, needs = x.dtype, ctx.needs_input_grad
        flat = x.reshape(-1, x.shape[-1])  # [T, in]
        matrix = weight.to(dtype)
        result = functional.linear(flat, matrix, None if bias is None else bias.to(dtype))  # [T, out]
        lowered = flat @ inner.to(dtype)  # [T, v]
        middle = lowered if core is None else lowered @ core.to(dtype).T  # [T, u]
        result.addmm_(middle, outer.to(dtype).T)
        ctx.remake = None if source is None else source.function
        kept = () if not needs[3] else (flat,) if source is None else source.inputs
        ctx.save_for_backward(lowered if needs[4] or needs[5] else None, matrix, inner, core, outer, *kept)
        ctx.shape = x.shape
        return result.view(*x.shape[:-1], result.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lowered, matrix, inner, core, outer, *kept = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad, grad.dtype
        flat = grad.reshape(-1, grad.shape[-1])  # [T, out]
        raised = flat @ outer.to(dtype)  # [T, u]
        grad_core = (raised.T @ lowered).to(core.dtype) if needs[4] else None
        back = raised if core is None else raised @ core.to(dtype)  # [T, v]
        grad_inner, grad_outer = None, None
        if needs[3]:
            grad_inner = (_remade(ctx, kept).T @ back).to(inner.dtype)
        if needs[5]:
            middle = lowered if core is None else lowered @ core.to(dtype).T
            grad_outer = (flat.T @ middle).to(outer.dtype)
        grad_x = None
        if needs[0]:
            grad_x = (flat @ matrix).addmm_(back, inner.to(dtype).T).view(ctx.shape)
        return grad_x, None, None, grad_inner, grad_core, grad_outer, None


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Any) -> Tensor:
        inner, outer, source = factors
        dtype, needs = x.dtype, ctx.needs_input_grad
        flat = x.reshape(-1, x.shape[-1])  # [T, in]
        matrix = (weight + outer.to(dtype) @ inner.to(dtype).T).to(dtype)  # [out, in]
        result = functional.linear(flat, matrix, None if bias is None else bias.to(dtype))  # [T, out]
        lowered = flat @ inner.to(dtype) if needs[4] else None  # [T, v]
        ctx.remake = None if source is None else source.function
        kept = () if not needs[3] else (flat,) if source is None else source.inputs
        ctx.save_for_backward(lowered, matrix if needs[0] else None, outer if needs[3] else None, *kept)
        ctx.shape, ctx.dtypes = x.shape, (inner.dtype, outer.dtype)
        return result.view(*x.shape[:-1], result.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lowered, matrix, outer, *kept = ctx.saved_tensors
        needs, dtype = ctx.needs_input_grad, grad.dtype
        flat = grad.reshape(-1, grad.shape[-1])  # [T, out]
        grad_inner, grad_outer = None, None
        if needs[3]:
            grad_inner = (_remade(ctx, kept).T @ (flat @ outer.to(dtype))).to(ctx.dtypes[0])
        if needs[4]:
            grad_outer = (flat.T @ lowered).to(ctx.dtypes[1])
        grad_x = (flat @ matrix).view(ctx.shape) if needs[0] else None
        return grad_x, None, None, grad_inner, grad_outer, None


def _remade(ctx: Any, kept: list[Tensor]) -> Tensor:
    """Return x [T, in] from what the forward pass kept of it."""
    return kept[0] if ctx.remake is None else ctx.remake(*kept).reshape(-1, ctx.shape[-1])
