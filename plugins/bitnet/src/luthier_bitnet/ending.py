"""The end of a run before that of its schedule, whose weights are then still partly exact."""

from __future__ import annotations

import attrs
from luthier import Progress, get_logger

log = get_logger()


@attrs.define
class Ending:
    """Warns once if the last step of a run comes before the end of its quantizer's schedule.

    A run asks before its first step what its layers will be at its end, so that the warning comes before the training.
    """

    quantizer: str
    purpose: str = "train"
    warned: bool = False

    def look(self, progress: Progress, share: float) -> None:
        """Look at how far the run and, by its share of rounding, the schedule are."""
        is_over = progress.total_steps is not None and 0 < progress.total_steps <= progress.step
        if self.purpose != "train" or self.warned or share >= 1 or not is_over:
            return
        self.warned = True
        log.warning(
            "the run ends before the schedule",
            quantizer=self.quantizer,
            rounded=round(share, 3),
            remedy="Let the schedule end within the run: the saved weights would still be partly exact.",
        )
