"""Penalties of the trained weights: absolute values, squares, and the distance to their start or ternary values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from luthier import Group
from torch import Tensor

from luthier_objectives import L2, L2Start

SMALL_ROLES: Final = ("norm", "bias")


class L2Penalty:
    """The sum of squares, times `weight`."""

    def __init__(self, options: L2) -> None:
        self.options = options

    def measure(self, groups: Sequence[Group]) -> Tensor | None:
        counted = [p for g in groups if self.options.all_roles or g.role not in SMALL_ROLES for p in g.parameters]
        costs = [self.cost(widened(parameter)) for parameter in counted]
        return self.options.weight * torch.stack(costs).sum() if costs else None

    def cost(self, weight: Tensor) -> Tensor:
        """Return the cost of one tensor, a scalar."""
        return weight.square().sum()


class L1Penalty(L2Penalty):
    """The sum of absolute values, times `weight`."""

    def cost(self, weight: Tensor) -> Tensor:
        return weight.abs().sum()


class StartPenalty:
    """The squared distance to the weights before the first step, times `weight`.

    This is L2-SP without its second term (Li et al. 2018, arXiv 1802.01483).
    """

    def __init__(self, options: L2Start) -> None:
        self.options = options
        self.start: Sequence[Group] = ()

    def begin(self, groups: Sequence[Group]) -> None:
        self.start = groups

    def measure(self, groups: Sequence[Group]) -> Tensor | None:
        costs = [
            (widened(now) - widened(before)).square().sum()
            for group, start in zip(groups, self.start, strict=True)
            if self.options.all_roles or group.role not in SMALL_ROLES
            for now, before in zip(group.parameters, start.parameters, strict=True)
        ]
        return self.options.weight * torch.stack(costs).sum() if costs else None


class TernaryPenalty(L2Penalty):
    """The squared distance to the nearest of -s, 0 and s, times `weight`. s is the tensor's mean absolute value.

    Scale and nearest value (Ma et al. 2024, arXiv 2402.17764) are not differentiated.
    """

    def cost(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().mean().clamp_min(torch.finfo(weight.dtype).tiny)
        nearest = (weight.detach() / scale).round().clamp(-1, 1) * scale
        return (weight - nearest).square().sum()


def widened(weight: Tensor) -> Tensor:
    """Return a weight in float32 or better."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
