"""Reach: the trained parameters that no gradient reaches, and those that do not move although one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from luthier.distributed.world import World
from luthier.health.watch import Remark
from luthier.model.nonfinite import local_part
from luthier.plugins.contracts.protocols import Adapter

WATCHED: Final = 5  # steps: after a warm-up's first rate of 0, the second matrix of LoRA moves from the third step on
MOVED: Final = 10  # steps after which a parameter that learns must have changed
SHOWN: Final = 3  # the most names in a remark
BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Reach:
    """A check of the adapter's parameters in the first steps of a run, and not afterwards.

    Each rank checks the part of them that it holds; a shard may well stay unchanged while others move.
    """

    def __init__(self, adapter: Adapter, world: World | None = None) -> None:
        self.adapter, self.world = adapter, world or World()
        self.reached: set[str] = set()
        self.prints: dict[str, int] = {}
        self.learning = False  # True once a step with a rate above 0 has been taken

    def begin(self) -> None:
        """Store the parameters' fingerprints before the first step."""
        self.prints = {name: fingerprint(p) for name, p in self._named()}

    def see(self, step: int, rate: float) -> list[Remark]:
        """Check gradients and weights after a step that moved the weights, while its gradients are still there."""
        self.learning |= rate > 0
        remarks: list[Remark] = []
        if step <= WATCHED:
            self.reached |= {name for name, p in self._named() if p.grad is not None and bool(local_part(p.grad).any())}
        if step == WATCHED:
            self.reached = set().union(*self.world.gather(sorted(self.reached)))
            idle = [name for name, _ in self._named() if name not in self.reached]
            remarks += _told("unreached", step, "no gradient reached", idle)
        return remarks + (self._unmoved(step) if step == MOVED else [])

    def end(self, step: int) -> list[Remark]:
        """Return the remarks of a run that was too short to be judged before its last step."""
        return self._unmoved(step) if step < MOVED else []

    def _unmoved(self, step: int) -> list[Remark]:
        prints, self.prints = self.prints, {}
        if not self.learning:
            return []
        mine = [n for n, p in self._named() if n in self.reached and p.numel() and prints.get(n) == fingerprint(p)]
        everyones = set(mine).intersection(*self.world.gather(mine))
        still = [name for name in mine if name in everyones]
        return _told("unmoved", step, "weights do not change although a gradient reaches them", still)

    def _named(self) -> list[tuple[str, Tensor]]:
        groups = self.adapter.groups()
        return [pair for group in groups for pair in zip(group.names, group.parameters, strict=True)]

    def state(self) -> dict[str, Any]:
        return {"reached": sorted(self.reached), "prints": self.prints, "learning": self.learning}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.reached, self.learning = set(state["reached"]), state["learning"]
        self.prints = dict(state["prints"])


def fingerprint(parameter: Tensor) -> int:
    """Return the sum of a parameter's bits, read as integers: practically every change of the parameter changes it."""
    values = local_part(parameter.detach())
    return int(values.view(BITS[values.element_size()]).sum(dtype=torch.int64))


def _told(kind: str, step: int, sentence: str, names: list[str]) -> list[Remark]:
    if not names:
        return []
    return [Remark(kind, step, sentence, {"parameters": len(names), "first": names[:SHOWN], "steps": step})]
