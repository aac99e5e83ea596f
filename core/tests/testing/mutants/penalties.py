"""Penalties: one that is sound, and those that break one rule each."""

from __future__ import annotations

from typing import Any

import torch


class Squares:
    """The weighted sum of squares."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def measure(self, groups):
        costs = [self.cost(p) for group in groups for p in group.parameters]
        return self.options.weight * torch.stack(costs).sum() if costs else None

    def cost(self, weight):
        return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum()


class GivesRows(Squares):
    def measure(self, groups):
        return torch.stack([self.options.weight * self.cost(p) for group in groups for p in group.parameters])


class LogOfNorm(Squares):
    def cost(self, weight):
        return super().cost(weight).log()


class RootOfSquares(Squares):
    def cost(self, weight):
        return super().cost(weight).sqrt()


class Detached(Squares):
    def cost(self, weight):
        return super().cost(weight.detach())


class Climbs(Squares):
    def cost(self, weight):
        cost = super().cost(weight)
        return 2 * cost.detach() - cost


class MeanOfWeights(Squares):
    def measure(self, groups):
        costs = [self.cost(p) for group in groups for p in group.parameters]
        return self.options.weight * torch.stack(costs).mean() if costs else None


class StaysLow(Squares):
    def cost(self, weight):
        return weight.square().sum()


class RoundsSquares(Squares):
    def cost(self, weight):
        return weight.square().sum().float()


class Shrinks(Squares):
    def cost(self, weight):
        cost = super().cost(weight)
        with torch.no_grad():
            weight.mul_(0.5)
        return cost


class Counts(Squares):
    calls = 0

    def cost(self, weight):
        self.calls += 1
        return super().cost(weight) * self.calls


class KeepsItsFirst(Squares):
    """The squared distance to the weights of its first start, whatever comes later."""

    start = None

    def begin(self, groups):
        if self.start is None:
            self.start = [p for group in groups for p in group.parameters]

    def measure(self, groups):
        pairs = zip([p for g in groups for p in g.parameters], self.start or (), strict=True)
        costs = [self.cost(now - before) for now, before in pairs]
        return self.options.weight * torch.stack(costs).sum() if costs else None


class NeedsAGroup(Squares):
    def measure(self, groups):
        return self.options.weight * torch.stack([self.cost(p) for g in groups for p in g.parameters]).sum()
