"""Order: which examples make up each optimizer step, as a function of (seed, epoch) alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import attrs
import numpy as np
from numpy.typing import NDArray


def order_rows(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of `size` examples in one epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


@attrs.frozen(kw_only=True)
class Order:
    """`size` examples in steps of `batch`; the last step of an epoch may be short."""

    size: int
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.size / self.batch)

    def steps(self, total: int | None, first: int = 0) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(step, indices) for steps `first` to `total` - 1, counted from 0; without end where `total` is None."""
        for step in itertools.count(first) if total is None else range(first, total):
            epoch, place = divmod(step, self.steps_per_epoch)
            if step == first or place == 0:
                order = order_rows(self.size, self.seed, epoch)
            yield step, order[place * self.batch : (place + 1) * self.batch]
