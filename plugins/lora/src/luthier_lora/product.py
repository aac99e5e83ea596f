"""The product with a frozen matrix and its low-rank update as one operation, which keeps little for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from luthier import find_source
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Weight = Tensor | Callable[[torch.dtype], Tensor]  # the matrix, or a function that lends it for one product
FAST: Final = (torch.bfloat16, torch.float16)  # dtypes whose rounding hides the order of a sum


def adapted_product(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Return x W^T + bias + scale (d(x) A^T) B^T, [..., out]. x is [..., in], W [out, in], A [r, in], B [out, r].

    W is frozen. d drops elements of x with probability `dropout`, and scales the rest to keep the mean.

    - A lent weight is borrowed again in backward, in the dtype of the product, and not kept between the passes.
    - Under autocast the products have its dtype, otherwise that of x. Gradients of A and B have the dtype of A and B.
    - B A is never formed, and x is kept once, for the gradient of A, or computed again if it has a source. The update
      is added into the base product without a pass of its own, as in unsloth's LoRA kernels, but on any device.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        x = x.to(dtype)
        mask, more = kept_elements(x, dropout) if dropout else (None, 1.0)
        weight_tensor, lend = (weight, None) if isinstance(weight, Tensor) else (None, weight)
        return _Product.apply(x, weight_tensor, bias, a, b, scale * more, mask, lend, find_source(x))


def rescaled_product(result: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """Return m / n (result - bias) + bias, [..., out]. result is [..., out]; m, n and bias are [out], n is constant.

    The result gets (m / n - 1) times itself, so that it stays the same bit for bit where m is n, and a small change is
    not lost in the 8 bits that a bfloat16 factor near one has. The gradient of m has the dtype of m.
    """
    return _Rescaled.apply(result, magnitude, norm, bias)


def kept_elements(x: Tensor, dropout: float) -> tuple[Tensor, float]:
    """Return a mask like x, False with probability `dropout`, and the scale that keeps the mean.

    Four elements share one 64-bit random number, because one for each would cost a CPU more than the products of a
    small layer. The probability is rounded to a multiple of 1 / 65536, and the scale is exact for the rounded
    probability.
    """
    dropped = round(dropout * 2**16)
    count = x.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    if dropped == 2**16:
        return torch.zeros_like(x, dtype=torch.bool), 0.0
    return drawn.view(torch.int16)[:count].view(x.shape) >= dropped - 2**15, 2**16 / (2**16 - dropped)


def applies(layer: Any, x: Tensor) -> bool:
    """Return True if the layer's forward is this product alone, without hooks or a forward of the instance."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooked and "forward" not in vars(layer) and not layer.weight.requires_grad and x.is_floating_point()


def lends(layer: Any, x: Tensor) -> bool:
    """Return True if a quantized layer has `lend_weight(dtype)`, and it may be used.

    The lent memory is valid until the next call, so that it cannot be used while the model is traced or rehearsed.
    """
    lent = hasattr(layer, "lend_weight") and type(x) in (Tensor, torch.nn.Parameter)
    return lent and not torch.compiler.is_compiling() and applies(layer, x)


def _accumulate(result: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Add scale left @ right to `result`, in place, in full precision in PEFT's order, to the same bits."""
    if result.dtype in FAST:
        return result.addmm_(left, right, alpha=scale)
    product = left @ right
    return result.add_(product.mul_(scale) if scale != 1.0 else product)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *update: Any) -> Tensor:
        a, b, scale, mask, lend, source = update
        flat = x.reshape(-1, x.shape[-1])  # [T, in]
        matrix = lend(x.dtype) if weight is None else weight.to(x.dtype)
        result = functional.linear(flat, matrix, None if bias is None else bias.to(x.dtype))  # [T, out]
        mask = None if mask is None else mask.reshape(flat.shape)
        inner = (flat if mask is None else flat * mask) @ a.to(x.dtype).T  # [T, r]
        _accumulate(result, inner, b.to(x.dtype).T, scale)
        ctx.remake = None if source is None else source.function
        kept = () if not ctx.needs_input_grad[3] else (flat,) if source is None else source.inputs
        ctx.save_for_backward(inner, weight, a, b, mask, *kept)
        ctx.scale, ctx.shape, ctx.lend = scale, x.shape, lend
        return result.view(*x.shape[:-1], result.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inner, weight, a, b, mask, *kept = ctx.saved_tensors
        dtype = inner.dtype
        flat = grad.reshape(-1, grad.shape[-1]).to(dtype)  # [T, out]
        scaled, rest = (flat, ctx.scale) if dtype in FAST else (flat * ctx.scale, 1.0)
        lowered = scaled @ b.to(dtype)  # [T, r]
        lowered = lowered.mul_(rest) if rest != 1.0 else lowered
        needs = ctx.needs_input_grad
        grad_a = None
        if needs[3]:
            x = kept[0] if ctx.remake is None else ctx.remake(*kept).reshape(-1, ctx.shape[-1])  # [T, in]
            grad_a = (lowered.T @ (x if mask is None else x * mask)).to(a.dtype)
        grad_b = (scaled.T @ inner).mul_(rest).to(b.dtype) if needs[4] else None
        grad_bias = flat.sum(0) if needs[2] else None
        grad_x = None
        if needs[0]:
            grad_x = flat @ (ctx.lend(dtype) if weight is None else weight.to(dtype))
            if mask is None:
                grad_x = _accumulate(grad_x, lowered, a.to(dtype), 1.0)
            else:
                grad_x.addcmul_(lowered @ a.to(dtype), mask)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None, None


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
        change = magnitude / norm - 1
        factor = change.to(result.dtype)
        ctx.save_for_backward(result if ctx.needs_input_grad[1] else None, change, norm, bias)
        scaled = torch.addcmul(result, result, factor)
        return scaled if bias is None else scaled.sub_(factor * bias.to(result.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        result, change, norm, bias = ctx.saved_tensors
        needs, grad_result, grad_magnitude, grad_bias = ctx.needs_input_grad, None, None, None
        if needs[1]:
            own = grad * result if bias is None else grad * (result - bias.to(result.dtype))
            grad_magnitude = _sum_rows(own).to(change.dtype) / norm
        if needs[0]:
            grad_result = torch.addcmul(grad, grad, change.to(grad.dtype))
        if needs[3]:
            grad_bias = (_sum_rows(grad) * -change).to(bias.dtype)
        return grad_result, grad_magnitude, None, grad_bias


def _sum_rows(tensor: Tensor) -> Tensor:
    """Return the sum [out] of all rows of a tensor [..., out], which torch adds up in float32 or better."""
    return tensor.reshape(-1, tensor.shape[-1]).sum(0)
