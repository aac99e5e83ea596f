"""Feeds: the examples of each optimizer step, whether the rows lie in memory or come in a stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import attrs

from luthier.data.batches.row_order import Order
from luthier.data.examples import TokenDataset, TokenExample


@attrs.frozen(kw_only=True, eq=False)
class Portion:
    """What one optimizer step trains on, over all ranks."""

    step: int  # from 0
    samples: int = 0  # that the steps before it took
    examples: Sequence[TokenExample]
    begun: float  # passes over the rows before it, and
    ended: float  # after it; a stream knows whole passes only
    ends_epoch: bool = False
    last: bool = False  # no step comes after it
    position: Any = None  # where a stream stands after it
    derived: int = 0  # documents that the loss added to its units, and
    cut: int = 0  # those of them that were too long
    ready: Any = None  # its micro-batches with the packing that they were made under, where they were made ahead

    @property
    def lengths(self) -> list[int]:
        return [len(example.input_ids) for example in self.examples]

    @property
    def num_tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def num_supervised(self) -> int:
        return sum(example.num_supervised for example in self.examples)


@attrs.frozen(kw_only=True)
class Reached:
    """How far a run has come: the steps it has done, the samples that they took, and how many one took at first."""

    step: int = 0
    samples: int = 0
    batch: int | None = None


START: Final = Reached()


class Feed(Protocol):
    """Where the loop gets its examples from, the same on every rank."""

    @property
    def total(self) -> int | None:
        """Steps of the run; None where they are not known, or there is no end."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Steps of one pass over the rows, None where they are not known."""

    def head(self, count: int) -> list[TokenExample]:
        """The first examples as they were read, at most `count`."""

    def portions(self, first: int) -> Iterator[Portion]:
        """The portions of step `first` (from 0) and of those after it, up to the last."""

    def state(self, portion: Portion | None) -> dict[str, Any]:
        """What goes on after `portion` (None: where the feed began) needs, as tensors and JSON values."""

    def load_state(self, state: Mapping[str, Any], reached: Reached = START) -> None:
        """Go on where `state` was taken, after what is `reached`; empty for rows that were others until then."""


@attrs.define(kw_only=True, eq=False)
class RowFeed:
    """Rows in memory: the order is a function of (seed, epoch), so that the samples taken say where it stands.

    The run ends after `max_steps` steps or `goal` samples, whichever is given and comes first.
    """

    dataset: TokenDataset
    order: Order
    max_steps: int | None = None
    goal: int | None = None
    begin: Reached = START

    @property
    def total(self) -> int | None:
        ends = [] if self.max_steps is None else [self.max_steps]
        if self.goal is not None:
            ends.append(self.begin.step + self.order.steps_between(self.begin.samples, self.goal))
        return min(ends, default=None)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def head(self, count: int) -> list[TokenExample]:
        return self.dataset.head(count)

    def portions(self, first: int) -> Iterator[Portion]:
        size, total = self.order.size, self.total
        slices = self.order.slices(self.order.samples_after(first - self.begin.step, self.begin.samples))
        for step in itertools.count(first) if total is None else range(first, total):
            samples, rows = next(slices)
            yield Portion(
                step=step,
                samples=samples,
                examples=[self.dataset[i] for i in rows.tolist()],
                begun=samples / size,
                ended=(samples + len(rows)) / size,
                ends_epoch=(samples + len(rows)) % size == 0,
                last=step + 1 == total,
            )

    def state(self, portion: Portion | None) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any], reached: Reached = START) -> None:
        self.begin = reached
