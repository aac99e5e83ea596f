"""A metric of the recipe, ready to score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs

from luthier.errors import LuthierError
from luthier.plugins.records import MetricRecord

if TYPE_CHECKING:
    from luthier.plugins.contracts.protocols import Metric


@attrs.frozen(kw_only=True)
class BuiltMetric:
    """A metric of the recipe, ready to score."""

    record: MetricRecord
    part: Metric

    def score(self, method: str, *given: Any) -> tuple[float, float]:
        """Return the (sum, count) that the part gives; `part-invalid` where it is none."""
        found = getattr(self.part, method)(*given)
        try:
            total, count = (float(number) for number in found)
        except (TypeError, ValueError):
            total = count = math.nan
        if not (math.isfinite(total) and math.isfinite(count) and count >= 0):
            raise LuthierError("part-invalid", f"{method} returns a finite sum and a count of 0 or more",
                               where=f"metric {self.record.name}", found=found)  # fmt: skip
        return total, count
