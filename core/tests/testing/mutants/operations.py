"""Operations: one that is sound, and those that break one rule each."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from luthier.model.operations import reference
from torch import Tensor
from torch.nn.functional import silu

CALLS: list[int] = []


def fits(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    return dtype.is_floating_point


def fits_nothing(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    return False


def fits_somehow(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> Any:
    return dtype.is_floating_point or None


def build_swiglu(options: Any) -> Any:
    return lambda gate, up: silu(gate) * up


def build_wrong_values(options: Any) -> Any:
    return lambda gate, up: torch.relu(gate) * up


class _LosesAGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return grad * up, grad * silu(gate)


def build_wrong_gradient(options: Any) -> Any:
    return _LosesAGradient.apply


def build_raising(options: Any) -> Any:
    return lambda gate, up: CALLS[10**9]


def build_writing(options: Any) -> Any:
    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        result = silu(gate) * up
        with torch.no_grad():
            gate.copy_(result)
        return result

    return swiglu


def build_wandering(options: Any) -> Any:
    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        CALLS.append(1)
        return silu(gate) * up * (1 + 1e-6 * len(CALLS))

    return swiglu


def build_frozen_head(options: Any) -> Any:
    """A head for frozen weights alone."""

    def score(states: Tensor, weight: Tensor, *rest: Any) -> Any:
        return NotImplemented if weight.requires_grad else reference.token_logprobs(states, weight, *rest)

    return score


def build_wrong_head(options: Any) -> Any:
    def score(states: Tensor, weight: Tensor, *rest: Any) -> Any:
        return NotImplemented if weight.requires_grad else reference.token_logprobs(states, weight, *rest) * 7 - 3

    return score


def build_shy(options: Any) -> Any:
    """It takes the call, and none of the six that it would be compared by."""
    asked = itertools.count()
    return lambda gate, up: NotImplemented if next(asked) % 7 else silu(gate) * up
