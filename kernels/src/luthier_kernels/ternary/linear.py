"""The ternary linear layer for training: states [..., in] @ (codes * scales).T give [..., out] in the states' dtype.

The codes and scales are those of a latent weight [out, in], which gets the gradient. With int8 activations the states
are quantized token by token, the codes are multiplied as integers, which is exact, and the sums are scaled in float32;
the result equals fake quantization. Backward is straight-through (arXiv 1308.3432) for both roundings: the gradient of
the states is gradient @ (codes * scales), that of the latent weight gradient.T @ (quantized states); scales and steps
are constants. For backward only int8 codes are kept; without int8 activations, the states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_kernels.products import multiply_turned
from luthier_kernels.registration import register_operation
from luthier_kernels.scratch import borrow_scratch
from luthier_kernels.ternary.activations import quantize_rows, reference_quantize
from luthier_kernels.ternary.expand import fill_expanded, reference_expand
from luthier_kernels.ternary.groups import ROW, TENSOR, check_granularity
from luthier_kernels.ternary.integers import multiply_integers


def multiply_ternary(
    states: Tensor,
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    granularity: str | int = "tensor",
    integers: bool = True,
) -> Tensor:
    """Return states @ (codes * scales).T. The gradient of that weight goes to `weight`, the latent one.

    `codes` and `scales` are what `quantize_ternary` returned for `weight`; they may be reused until it changes.
    `integers` quantizes activations to int8. Under autocast its dtype is used.
    """
    kind = states.device.type
    if torch.is_autocast_enabled(kind):
        states = states.to(torch.get_autocast_dtype(kind))
    return FORWARD(states, weight, codes, scales, check_granularity(granularity), integers)[0]


def reference_multiply(states: Tensor, codes: Tensor, scales: Tensor, group: int, integers: bool) -> Tensor:
    """Compute the forward pass in plain torch, by fake quantization; float64 states stay float64."""
    weight = reference_expand(codes, scales.to(torch.promote_types(states.dtype, torch.float32)), group)
    if integers:
        rounded, steps = reference_quantize(states)
        states = rounded.to(steps.dtype) * steps
    return F.linear(states.to(weight.dtype), weight)


def _multiply(
    states: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, group: int, integers: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and the quantized states for backward (empty without int8 activations)."""
    flat = states.reshape(-1, states.shape[-1])
    shape = (*states.shape[:-1], codes.shape[0])
    if not integers:
        out = F.linear(flat, _dense(codes, scales, group, states.dtype, "weight"))
        return out.view(shape), codes.new_empty(0), scales.new_empty(0)
    rounded, steps = quantize_rows(flat)
    if group in (TENSOR, ROW):
        out = multiply_integers(rounded, codes, steps, scales, states.dtype)
    else:  # groups have scales of their own, so that sums over whole rows cannot be scaled
        exact = _dense(rounded, steps, ROW, torch.float32, "states")
        out = F.linear(exact, _dense(codes, scales, group, torch.float32, "weight")).to(states.dtype)
    return out.view(shape), rounded, steps


def _multiply_back(
    gradient: Tensor, states: Tensor, steps: Tensor, codes: Tensor, scales: Tensor, group: int, wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return gradients of states [..., in] and weight [out, in] in `dtype`, empty if not wanted."""
    flat = gradient.reshape(-1, gradient.shape[-1])
    to_states, to_weight = gradient.new_empty(0), gradient.new_empty(0, dtype=dtype)
    if wanted[0] and group == TENSOR:
        to_states = _scaled_product(flat, codes, scales).view(*gradient.shape[:-1], codes.shape[1])
    elif wanted[0]:
        dense = _dense(codes, scales, group, gradient.dtype, "weight")
        to_states = (flat @ dense).view(*gradient.shape[:-1], codes.shape[1])
    if wanted[1]:
        flat_states = states.reshape(-1, states.shape[-1])
        seen = _dense(flat_states, steps, ROW, gradient.dtype, "states") if steps.numel() else flat_states
        to_weight = multiply_turned(flat, seen.to(gradient.dtype)).to(dtype)
    return to_states, to_weight


def _scaled_product(flat: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return (flat @ codes) * scale. Codes are exact in any dtype; on a processor the sums are scaled before they are
    rounded, which on a GPU would wait for the scale."""
    dense = _dense(codes, torch.ones_like(scales), TENSOR, flat.dtype, "weight")
    if flat.device.type == "cpu" and type(scales) is Tensor:
        return torch.addmm(flat.new_zeros(1), flat, dense, beta=0, alpha=scales.item())
    return (flat @ dense).mul_(scales[0, 0])


def _dense(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype, use: str) -> Tensor:
    """Return codes * scales in borrowed memory. Weights and states have separate memory."""
    out = borrow_scratch(codes.shape, dtype, codes.device, use)
    return fill_expanded(codes, scales, group, out)


def _fake(
    states: Tensor, weight: Tensor, codes: Tensor, scales: Tensor, group: int, integers: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out = states.new_empty((*states.shape[:-1], codes.shape[0]))
    if not integers:
        return out, codes.new_empty(0), scales.new_empty(0)
    rows = states.numel() // states.shape[-1]
    return out, codes.new_empty(rows, states.shape[-1]), scales.new_empty(rows, 1)


def _fake_back(
    gradient: Tensor, states: Tensor, steps: Tensor, codes: Tensor, scales: Tensor, group: int, wanted: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    to_states = gradient.new_empty((*gradient.shape[:-1], codes.shape[1]) if wanted[0] else 0)
    return to_states, codes.new_empty(codes.shape if wanted[1] else 0, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, weight, codes, scales, ctx.group, integers = inputs
    _, rounded, steps = output
    ctx.mark_non_differentiable(rounded, steps)
    ctx.set_materialize_grads(False)  # zeros for the codes and steps would be made at each step
    ctx.dtype = weight.dtype
    ctx.save_for_backward(rounded if integers else states, steps, codes, scales)


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 6
    wanted = list(ctx.needs_input_grad[:2])
    to_states, to_weight = BACKWARD(gradient, *ctx.saved_tensors, ctx.group, wanted, ctx.dtype)
    return to_states if wanted[0] else None, to_weight if wanted[1] else None, None, None, None, None


BACKWARD = register_operation(
    "multiply_ternary_back(Tensor gradient, Tensor states, Tensor steps, Tensor codes, Tensor scales, int group, "
    "bool[] wanted, ScalarType dtype) -> (Tensor, Tensor)",
    _multiply_back,
    _fake_back,
)
FORWARD = register_operation(
    "multiply_ternary(Tensor states, Tensor weight, Tensor codes, Tensor scales, int group, bool integers) "
    "-> (Tensor, Tensor, Tensor)",
    _multiply,
    _fake,
    _save,
    _backward,
)
