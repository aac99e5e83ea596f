"""Early stopping: a run whose metric no longer improves is stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from luthier.builtin import EarlyStopping
from luthier.plugins.events import event


class Stopper:
    """Stops after exactly `patience` evaluations in a row without an improvement of more than `min_delta`."""

    def __init__(self, options: EarlyStopping) -> None:
        self.options = options
        self.needs_metrics = {"metric": options.metric}
        self.best: float | None = None
        self.waited = 0

    @event
    def evaluated(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        name, value = self.options.metric, metrics[self.options.metric]
        if self._improves(value):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.options.patience:
            compared = "" if self.best is None else f" on {self.best:.4g}"
            run.request_stop(f"{name} has not improved{compared} in {self.waited} evaluations")

    def _improves(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.options.mode == "min" else value - self.best
        return gain > self.options.min_delta

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
