"""Callbacks: one that is sound, and those that break one rule each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from luthier.plugins.events import event


class Count:
    """Counts each `every`-th step, across resumes."""

    def __init__(self, options: Any) -> None:
        self.options, self.steps = options, 0

    @event
    def step_ended(self, step: int) -> None:
        if step % self.options.every == 0:
            self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "share": torch.tensor([self.steps / 2])}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


class NeedsAStart(Count):
    """Opens what it needs when a run starts, and not when one resumes."""

    @event
    def run_started(self, run):
        self.seen = {}

    @event
    def logged(self, step):
        self.seen[step] = True


class NeedsANumber(Count):
    @event
    def completed(self, result):
        self.last = result.eval_metrics["eval_bleu"]


class EmptiesMetrics(Count):
    @event
    def logged(self, metrics):
        metrics.pop("loss")


class ChangesSettings(Count):
    @event
    def step_started(self, run):
        run.settings["learning_rate"] = 0.0


class ChangesAParameter(Count):
    @event
    def completed(self, result):
        with torch.no_grad():
            next(result.model.parameters()).zero_()


class SharesItsCount(Count):
    counts: ClassVar[list[int]] = []

    @event
    def logged(self, step):
        self.counts.append(step)


class SharesItsState(Count):
    """Its state is a tensor of the class."""

    total: ClassVar[Any] = torch.zeros(1)

    @event
    def logged(self, step):
        self.total += 1

    def state(self):
        return {"total": self.total, "steps": self.steps, "share": torch.zeros(1)}


class KeepsAPath(Count):
    def state(self):
        return {"path": Path("somewhere"), "steps": self.steps}


class ForgetsHalf(Count):
    def load_state(self, state):
        self.steps = 0


class StateWithoutWayBack(Count):
    load_state = property()


class Unmarked(Count):
    def evaluated(self, run, step, metrics):
        self.steps = step


class UnknownArgument(Count):
    @event
    def evaluated(self, run, loss):
        self.steps = loss
