"""APOLLO (Zhu et al., arXiv:2412.05270): the sizes of AdamW's steps, estimated in a random low-rank projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier_optimizers.stepper import State, Stepper, adam_direction, decay, empty_moments, step_adamw


class ApolloStepper(Stepper):
    """Groups with `projected` True are stepped by APOLLO where a matrix is wider than the rank; all else by AdamW."""

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
        """Shorten a step that is longer than the one before by more than this factor."""
        length = float(move.norm())
        if growth and state["length"] and length > growth * state["length"]:
            move.mul_(growth * state["length"] / length)
            length = growth * state["length"]
        state["length"] = length


def _is_projected(weight: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["projected"]) and weight.dim() == 2 and min(weight.shape) > group["rank"]


def _projection(sides: Tensor, step: int, group: dict[str, Any]) -> Tensor:
    """The projection (rank, shorter side) of this stretch of steps: the seed and the weight's number give it again."""
    stretch = (step - 1) // group["refresh_steps"]
    key = (group["seed"] * 1_000_003 + stretch * 8191 + group["number"]) % 2**31
    random = torch.Generator().manual_seed(key)
    drawn = torch.randn(group["rank"], sides.shape[0], generator=random)
    return drawn.to(sides.device, sides.dtype) / group["rank"] ** 0.5
