"""Scores: what each row adds to a number, and how sure the number is, by drawing the rows anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.randomness import number_of

LEVEL: Final = 0.95  # the confidence level of an interval
PIECE: Final = 4_000_000  # numbers of resampled rows that are drawn at once

Conclude = Callable[[Sequence[float]], float]
Interval = tuple[float, float]


def divide_totals(totals: Sequence[float]) -> float:
    """Return the sum over the count; NaN where nothing is counted."""
    return totals[0] / totals[1] if totals[1] else math.nan


@attrs.frozen(kw_only=True, eq=False)
class Scores:
    """The contributions of N rows to a number, and how the totals [k] become the number: by default sum over count."""

    rows: NDArray[np.float64]  # [N, k]
    conclude: Conclude = divide_totals

    @property
    def value(self) -> float:
        return self.conclude(self.rows.sum(0).tolist())

    def interval(self, seed: int, resamples: int) -> Interval:
        """Return the percentile bootstrap interval at 95 %: rows drawn with replacement (Efron 1979)."""
        drawn = (self.conclude(totals) for totals in self._totals(seed, resamples))
        return _quantiles([value for value in drawn if not math.isnan(value)])

    def difference_interval(self, other: Scores, seed: int, resamples: int) -> Interval:
        """Return that of this number less the other's, the same rows drawn for both, which must be equally many."""
        both = zip(self._totals(seed, resamples), other._totals(seed, resamples), strict=True)
        drawn = (self.conclude(own) - other.conclude(others) for own, others in both)
        return _quantiles([value for value in drawn if not math.isnan(value)])

    def _totals(self, seed: int, resamples: int) -> Iterator[list[float]]:
        """Yield the totals over each draw; what is drawn depends on seed, number of draws and number of rows alone."""
        count, random = len(self.rows), np.random.default_rng(number_of("bootstrap", seed))
        shares, most = np.full(count, 1 / count), max(1, PIECE // count)
        for first in range(0, resamples, most):
            drawn = random.multinomial(count, shares, size=min(most, resamples - first))
            yield from (drawn @ self.rows).tolist()


def _quantiles(values: Sequence[float]) -> Interval:
    if not values:
        return math.nan, math.nan
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return low, high
