"""Feeds: the examples of each optimizer step, from rows in memory or from a stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import attrs

from luthier.data.batches.row_order import Order
from luthier.data.examples import TokenDataset, TokenExample


@attrs.frozen(kw_only=True, eq=False)
class Portion:
    """The examples that one optimizer step trains on, over all ranks."""

    step: int  # from 0
    samples: int = 0  # the samples that the steps before it took
    examples: Sequence[TokenExample]
    begun: float  # passes over the rows before it
    ended: float  # passes after it; a stream knows only complete passes
    ends_epoch: bool = False
    last: bool = False  # True if no step comes after it
    position: Any = None  # the position of a stream after it
    derived: int = 0  # documents that the loss added to its units
    cut: int = 0  # added documents that were too long
    ready: Any = None  # micro-batches made ahead, with the packing that they were made for; None: not made yet

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
    """The progress of a run: its steps, the samples that they took, and the samples of one step at first."""

    step: int = 0
    samples: int = 0
    batch: int | None = None


START: Final = Reached()


class Feed(Protocol):
    """The source of the loop's examples, the same on every rank."""

    @property
    def total(self) -> int | None:
        """Return the steps of the run; None if they are not known, or there is no end."""

    @property
    def steps_per_epoch(self) -> int | None:
        """Return the steps of one pass over the rows; None if they are not known."""

    def head(self, count: int) -> list[TokenExample]:
        """Return the first examples in the order of reading, at most `count`."""

    def portions(self, first: int) -> Iterator[Portion]:
        """Yield the portions of step `first` (from 0) and of all later ones, up to the last."""

    def state(self, portion: Portion | None) -> dict[str, Any]:
        """Return the state after `portion` (None: before the first), as tensors and JSON values."""

    def load_state(self, state: Mapping[str, Any], reached: Reached = START) -> None:
        """Continue where `state` was taken, after `reached`.

        `state` is empty if the rows differ from those until then.
        """


@attrs.define(kw_only=True, eq=False)
class RowFeed:
    """A feed of rows in memory. The order depends on (seed, epoch), so that the samples taken say where it is.

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
