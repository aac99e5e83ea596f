"""Feeds: the examples of each optimizer step, whether the rows lie in memory or come in a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs

from luthier.data.batches.row_order import Order
from luthier.data.examples import TokenDataset, TokenExample


@attrs.frozen(kw_only=True, eq=False)
class Portion:
    """What one optimizer step trains on, over all ranks."""

    step: int  # from 0
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

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""


@attrs.define(kw_only=True, eq=False)
class RowFeed:
    """Rows in memory: the order is a function of (seed, epoch), so that a step's number says where it stands."""

    dataset: TokenDataset
    order: Order
    total: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def head(self, count: int) -> list[TokenExample]:
        return self.dataset.head(count)

    def portions(self, first: int) -> Iterator[Portion]:
        for step, rows in self.order.steps(self.total, first=first):
            yield Portion(
                step=step,
                examples=[self.dataset[i] for i in rows.tolist()],
                begun=step / self.steps_per_epoch,
                ended=(step + 1) / self.steps_per_epoch,
                ends_epoch=(step + 1) % self.steps_per_epoch == 0,
                last=step + 1 == self.total,
            )

    def state(self, portion: Portion | None) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing: the step says it all."""
