"""The meter of a step or an evaluation: sums and weights over micro-batches, divided only when read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from luthier.distributed.world import World
from luthier.plugins.contracts.values import LossOutput


class Meter:
    """Sums and weights over micro-batches; divided only when read."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.weights: dict[str, float] = defaultdict(float)
        self.metrics: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, output: LossOutput, terms: dict[str, float]) -> None:
        self._count(output.sums, terms, output.metrics)

    def over(self, world: World) -> Meter:
        """Return the sums over all ranks of the world."""
        if world.size == 1:
            return self
        total = Meter()
        counted: list[Any] = [self.sums, self.weights, self.metrics]
        for sums, weights, metrics in world.gather(counted):
            total._count(sums, weights, metrics)
        return total

    def include(self, other: Meter) -> None:
        """Count what another meter has counted."""
        self._count(other.sums, other.weights, other.metrics)

    def _count(self, sums: dict[str, Any], weights: dict[str, Any], metrics: Mapping[str, Any]) -> None:
        for totals, given in ((self.sums, sums), (self.weights, weights)):
            for name, value in given.items():
                totals[name] += _number(value)
        for name, (total, count) in metrics.items():
            self.metrics[name][0] += _number(total)
            self.metrics[name][1] += _number(count)

    @property
    def loss(self) -> float:
        """Return the objective: the sum of each term's sum over its weight."""
        return sum(self.terms().values())

    def terms(self) -> dict[str, float]:
        """Return the value of each term of the objective."""
        return {name: value / self.weights[name] for name, value in self.sums.items() if self.weights[name]}

    def shares(self) -> dict[str, tuple[float, float]]:
        """Return each term's (sum, weight)."""
        return {name: (value, self.weights[name]) for name, value in self.sums.items()}

    def pairs(self) -> dict[str, tuple[float, float]]:
        """Return each metric's (sum, count)."""
        return {name: (total, count) for name, (total, count) in self.metrics.items()}

    def read(self) -> dict[str, float]:
        return divide_sums([self.pairs()])


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def divide_sums(parts: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Terms or metrics over several steps or batches: sums added, counts added, then divided."""
    names = dict.fromkeys(name for part in parts for name in part)
    sums = {n: [sum(part[n][i] for part in parts if n in part) for i in (0, 1)] for n in names}
    return {name: total / count for name, (total, count) in sums.items() if count}
