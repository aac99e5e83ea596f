"""Dynamic loss scaling: float16 gradients are kept in its range by a factor that an overflow halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.logs import get_logger

log = get_logger()
LEAST: Final = 2.0**-14  # a gradient that overflows at this scale has another problem than its range
MOST: Final = 2.0**40


@attrs.define(kw_only=True)
class LossScaler:
    """The objective is multiplied by `scale` before backward, gradients are divided by it before anyone reads them.

    A step whose gradient overflows is skipped, and the scale times `backoff_factor`; after `growth_interval` steps in
    a row without overflow it is times `growth_factor`. Micikevicius et al. 2018, arXiv 1710.03740, section 3.2.
    """

    scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    good_steps: int = 0  # finite steps in a row
    overflows: int = 0  # in the whole run

    def scaled(self, objective: Tensor) -> Tensor:
        return objective * self.scale

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """In place, in the gradients' own float32."""
        if gradients:
            torch._foreach_mul_(list(gradients), 1.0 / self.scale)

    def judge(self, finite: bool, step: int) -> None:
        """Take note of the gradient of `step`. Raises `train-nonfinite` where no scale helps."""
        if finite:
            self.good_steps += 1
            if self.good_steps >= self.growth_interval:
                self.scale, self.good_steps = min(self.scale * self.growth_factor, MOST), 0
            return
        self.scale, self.good_steps, self.overflows = self.scale * self.backoff_factor, 0, self.overflows + 1
        log.info("gradient overflow", step=step, loss_scale=self.scale, overflows=self.overflows)
        if self.scale < LEAST:
            problem = f"gradients overflow float16 at any scale of the loss, now {self.scale:g} at step {step}"
            raise LuthierError("train-nonfinite", problem, remedy="Set precision: bf16 or float32.")

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.scale, self.good_steps, self.overflows = state["scale"], state["good_steps"], state["overflows"]
