"""Penalties of the weights that train: absolute, squared, and their distance to three values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from luthier import Group
from torch import Tensor

from luthier_objectives import L2

SMALL_ROLES: Final = ("norm", "bias")


class L2Penalty:
    """`weight` times the sum of squares."""

    def __init__(self, options: L2) -> None:
        self.options = options

    def measure(self, groups: Sequence[Group]) -> Tensor | None:
        counted = [p for g in groups if self.options.all_roles or g.role not in SMALL_ROLES for p in g.parameters]
        costs = [self.cost(widened(parameter)) for parameter in counted]
        return self.options.weight * torch.stack(costs).sum() if costs else None

    def cost(self, weight: Tensor) -> Tensor:
        """Return the scalar that one tensor costs."""
        return weight.square().sum()


class L1Penalty(L2Penalty):
    """`weight` times the sum of absolute values."""

    def cost(self, weight: Tensor) -> Tensor:
        return weight.abs().sum()


class TernaryPenalty(L2Penalty):
    """`weight` times the squared distance to the nearest of -s, 0 and s, where s is the tensor's mean absolute value.

    Scale and nearest value (Ma et al. 2024, arXiv 2402.17764) are not differentiated.
    """

    def cost(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().mean().clamp_min(torch.finfo(weight.dtype).tiny)
        nearest = (weight.detach() / scale).round().clamp(-1, 1) * scale
        return (weight - nearest).square().sum()


def widened(weight: Tensor) -> Tensor:
    """Return a weight in float32 or better."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
