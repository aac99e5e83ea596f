"""APOLLO (Zhu et al. 2024, arXiv 2412.05270): AdamW's step sizes, estimated in a random low-rank projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier_optimizers.stepper import State, Stepper, adam_direction, decay, empty_moments, step_adamw


class ApolloStepper(Stepper):
    """An optimizer that steps matrices wider than the rank in `projected` groups by APOLLO, the rest by AdamW."""

    def empty(self, weight: Tensor, group: dict[str, Any]) -> State:
        if not _is_projected(weight, group):
            return empty_moments(weight)
        return {**empty_moments(weight.new_empty(group["rank"], max(weight.shape))), "length": 0.0}

    def advance(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        if not _is_projected(weight, group):
            step_adamw(weight, gradient, state, group)
            return
        upright = weight.shape[0] > weight.shape[1]  # the shorter side is projected
        sides = gradient.T if upright else gradient
        low = _projection(sides, state["step"], group) @ sides  # (rank, longer side)
        direction = adam_direction(low, state, group)
        dim = 0 if group["scale_by"] == "channel" else None
        factors = direction.norm(dim=dim) / low.norm(dim=dim).clamp(min=1e-30)
        move = sides * factors * group["scale"]
        self._limit(move, state, group["max_growth"])
        decay(weight, group)
        weight.add_(move.T if upright else move, alpha=-group["lr"])

    def _limit(self, move: Tensor, state: State, growth: float) -> None:
        """Shorten a step that is longer than the previous one by more than the factor `growth`."""
        length = float(move.norm())
        if growth and state["length"] and length > growth * state["length"]:
            move.mul_(growth * state["length"] / length)
            length = growth * state["length"]
        state["length"] = length


def _is_projected(weight: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["projected"]) and weight.dim() == 2 and min(weight.shape) > group["rank"]


def _projection(sides: Tensor, step: int, group: dict[str, Any]) -> Tensor:
    """Return the projection (rank, shorter side) of this interval of steps, from the seed and the weight's number."""
    stretch = (step - 1) // group["refresh_steps"]
    key = (group["seed"] * 1_000_003 + stretch * 8191 + group["number"]) % 2**31
    random = torch.Generator().manual_seed(key)
    drawn = torch.randn(group["rank"], sides.shape[0], generator=random)
    return drawn.to(sides.device, sides.dtype) / group["rank"] ** 0.5
