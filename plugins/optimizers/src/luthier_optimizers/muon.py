"""Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982): steps are the orthogonalised momentum of matrices."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from luthier_optimizers.stepper import State, Stepper, decay, empty_moments, step_adamw

COEFFICIENTS: Final = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan's quintic, which brings singular values to 0.7 to 1.2 in 5 iterations
TINY: Final = 1e-7


class MuonStepper(Stepper):
    """An optimizer that steps matrices in `orthogonal` groups by Muon, and the rest by AdamW."""

    def empty(self, weight: Tensor, group: dict[str, Any]) -> State:
        if _is_orthogonal(weight, group):
            return {"momentum": torch.zeros_like(weight, memory_format=torch.contiguous_format)}
        return empty_moments(weight)

    def advance(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        if not _is_orthogonal(weight, group):
            step_adamw(weight, gradient, state, group)
            return
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["momentum"], group["momentum"]) if group["nesterov"] else state["momentum"]
        decay(weight, group)
        rate = group["lr"] * step_size(weight.shape, group["adjust_lr"])
        weight.add_(orthogonalize(ahead, group["ns_steps"]).to(weight.dtype), alpha=-rate)


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Return approximately U V^T of a matrix U S V^T, by Newton-Schulz iterations, in bfloat16 on a GPU."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    iterate = matrix if wide else matrix.T
    if iterate.device.type == "cuda":
        iterate = iterate.bfloat16()
    iterate = iterate / iterate.norm().clamp(min=TINY)
    for _ in range(steps):
        gram = iterate @ iterate.T
        iterate = a * iterate + (b * gram + c * gram @ gram) @ iterate
    return iterate if wide else iterate.T


def step_size(shape: torch.Size, rule: str) -> float:
    """Return the factor of the learning rate for a matrix of this shape."""
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if rule == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))


def _is_orthogonal(weight: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["orthogonal"]) and weight.dim() == 2
