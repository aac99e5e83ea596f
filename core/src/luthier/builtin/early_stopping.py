"""Early stopping: a run whose metric no longer improves is stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from luthier.builtin import EarlyStopping
from luthier.errors import LuthierError, nearest
from luthier.plugins.events import event


class Stopper:
    """Stops after exactly `patience` evaluations in a row without an improvement of more than `min_delta`."""

    def __init__(self, options: EarlyStopping) -> None:
        self.options = options
        self.best: float | None = None
        self.waited = 0

    @event
    def run_started(self, run: Any) -> None:
        self._require_rows(run)

    @event
    def resumed(self, run: Any) -> None:
        self._require_rows(run)

    @event
    def evaluated(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        name = self.options.metric
        if name not in metrics:
            raise LuthierError(
                "recipe-conflict", f"an evaluation gives no {name!r}", where="early_stopping.metric",
                remedy=nearest(name, metrics),
            )  # fmt: skip
        value = metrics[name]
        if self._improves(value):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.options.patience:
            found = "" if self.best is None else f" on {self.best:.4g}"
            run.request_stop(f"{name} has not improved{found} in {self.waited} evaluations")

    def _require_rows(self, run: Any) -> None:
        """Without held-out rows nothing would ever be evaluated, and nothing stopped."""
        if not run.settings["data"]["validation"]:
            raise LuthierError("recipe-conflict", "there are no validation rows", where="early_stopping",
                               remedy="Set data.validation, or leave this out.")  # fmt: skip

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
