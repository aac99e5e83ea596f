"""A metric of the recipe, ready to score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from luthier.errors import LuthierError
from luthier.plugins.completion import has_default

if TYPE_CHECKING:
    from luthier.plugins.contracts.protocols import Metric


@attrs.frozen(kw_only=True)
class BuiltMetric:
    """A metric of the recipe, ready to score."""

    name: str  # as an evaluation reports it, `eval_` before it
    record: Any  # the record, or the object of the caller, which both have over, wants and greater_is_better
    part: Metric

    def score_tokens(self, statistics: Any) -> tuple[float, float]:
        """Return the (sum, count) that the part gives; `part-invalid` where it is none."""
        total, count = self._pair("score_tokens", self.part.score_tokens(statistics))
        return total, count

    def score_answers(self, predictions: Sequence[str], reference: str) -> tuple[float, ...]:
        """Return what the answers to one prompt add: (sum, count), or statistics that the part itself concludes."""
        scores = self.part.score_answers(predictions, reference)
        if has_default(self.part, "metric", "conclude"):
            asked = "score_answer" if has_default(self.part, "metric", "score_answers") else "score_answers"
            return self._pair(asked, scores)
        numbers = _numbers(scores)
        if not numbers or not all(map(math.isfinite, numbers)):
            raise LuthierError("part-invalid", "score_answers returns finite statistics",
                               where=f"metric {self.name}", found=scores)  # fmt: skip
        return numbers

    def _pair(self, method: str, answer: Any) -> tuple[float, ...]:
        numbers = _numbers(answer)
        if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] < 0:
            raise LuthierError("part-invalid", f"{method} returns a finite sum and a count of 0 or more",
                               where=f"metric {self.name}", found=answer)  # fmt: skip
        return numbers


def _numbers(answer: Any) -> tuple[float, ...]:
    """Return what a part gave as numbers; nothing where it is no sequence of such."""
    try:
        return tuple(float(number) for number in answer)
    except (TypeError, ValueError):
        return ()
