"""The order of rows: the examples of each optimizer step, as a function of (seed, epoch) and the samples before it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs
import numpy as np
from numpy.typing import NDArray


def order_rows(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of `size` examples in one epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


@attrs.frozen(kw_only=True)
class Order:
    """The order of `size` examples in steps of `batch`. The last step of an epoch may be short.

    A place in it is the number of samples of all steps before, so that a run may continue with another batch size.
    """

    size: int
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.size / self.batch)

    def slices(self, first: int = 0) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (samples before it, its examples) of the step after `first` samples and all later ones, endlessly."""
        epoch, place = divmod(first, self.size)
        while True:
            order = order_rows(self.size, self.seed, epoch)
            for start in range(place, self.size, self.batch):
                yield epoch * self.size + start, order[start : start + self.batch]
            epoch, place = epoch + 1, 0

    def samples_after(self, steps: int, first: int = 0) -> int:
        """Return how many samples were taken once `steps` steps follow on `first` samples."""
        epoch, place = divmod(first, self.size)
        rest = math.ceil((self.size - place) / self.batch)
        if steps < rest:
            return first + steps * self.batch
        epochs, more = divmod(steps - rest, self.steps_per_epoch)
        return (epoch + 1 + epochs) * self.size + more * self.batch

    def steps_between(self, first: int, goal: int) -> int:
        """Return how many steps follow on `first` samples until `goal` are taken, or a few more than that."""
        if goal <= first:
            return 0
        end = (first // self.size + 1) * self.size
        if goal <= end:
            return math.ceil((goal - first) / self.batch)
        epochs, more = divmod(goal - end, self.size)
        return math.ceil((end - first) / self.batch) + epochs * self.steps_per_epoch + math.ceil(more / self.batch)

    def count_steps(self, samples: int) -> float:
        """Return how many steps of this batch so many samples are, with the part of the last one."""
        epoch, place = divmod(samples, self.size)
        return epoch * self.steps_per_epoch + place / self.batch
