"""The linear layer over a frozen 4-bit weight: states [..., in] @ weight.T give [..., out] in the dtype of the states.

States are float32, bfloat16 or float16; the packed weight stands for [out, in]. It is dequantized into one reused
buffer, in forward and again in backward, and multiplied by torch: at training sizes the product costs many times more
than the dequantization. The weight gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_kernels.fourbit.dequantize import FourBitParts, fill_dequantized
from luthier_kernels.registration import register_operation
from luthier_kernels.scratch import borrow_scratch

Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[int], str, int]  # a FourBitWeight's arguments()
SCHEMA = "Tensor packed, Tensor scales, Tensor? nested, Tensor? offset, SymInt[] shape, str kind, int block_size"


def multiply_fourbit(states: Tensor, weight: Given) -> Tensor:
    """Return states @ weight.T. `weight` is `FourBitWeight.arguments()`. Under autocast its dtype is used."""
    kind = states.device.type
    if torch.is_autocast_enabled(kind):
        states = states.to(torch.get_autocast_dtype(kind))
    return FORWARD(states, *weight)


def lend_fourbit(weight: Given, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in borrowed memory, which the next call in this thread overwrites."""
    packed, scales, *rest = weight
    return _weight(packed.new_empty(0, dtype=dtype), packed, scales, tuple(rest))


def reference_multiply(states: Tensor, weight: Tensor) -> Tensor:
    """Compute the same in plain torch from the dequantized weight [out, in]."""
    return F.linear(states, weight.to(states.dtype))


def _weight(states: Tensor, packed: Tensor, scales: Tensor, rest: tuple[Any, ...]) -> Tensor:
    nested, offset, shape, kind, block_size = rest
    out = borrow_scratch(shape, states.dtype, states.device)
    return fill_dequantized(FourBitParts(packed, scales, nested, offset, kind, block_size), out)


def _multiply(states: Tensor, packed: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return F.linear(states, _weight(states, packed, scales, rest))


def _multiply_back(gradient: Tensor, packed: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return gradient @ _weight(gradient, packed, scales, rest)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scales, nested, offset, *ctx.settings = inputs
    ctx.save_for_backward(packed, scales, nested, offset)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    states = BACKWARD(gradient, *ctx.saved_tensors, *ctx.settings) if ctx.needs_input_grad[0] else None
    return (states, *[None] * 7)


BACKWARD = register_operation(
    f"multiply_fourbit_back(Tensor gradient, {SCHEMA}) -> Tensor",
    _multiply_back,
    lambda gradient, packed, scales, nested, offset, shape, *rest: gradient.new_empty(*gradient.shape[:-1], shape[1]),
)
FORWARD = register_operation(
    f"multiply_fourbit(Tensor states, {SCHEMA}) -> Tensor",
    _multiply,
    lambda states, packed, scales, nested, offset, shape, *rest: states.new_empty(*states.shape[:-1], shape[0]),
    _save,
    _backward,
)
