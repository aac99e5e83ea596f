"""The position of a stream between two steps, and its form in a checkpoint."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, Final

import attrs
import numpy as np

from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.stream.source_lines import Place
from luthier.data.stream.source_turns import Turn
from luthier.data.tokenise.token_blocks import NOTHING

ARRAYS: Final = ("input_ids", "labels", "starts", "weights", "documents", "index")
COUNTS: Final = ("epoch", "read", "samples", "epoch_samples", "supervised", "rows", "bad")


@attrs.define(kw_only=True, eq=False)
class Position:
    """The position of a stream between two steps."""

    epoch: int = 0
    turns: list[Turn] = attrs.field(factory=list)  # one for each line; empty: nothing was read yet
    read: bool = False  # True once all rows of the epoch are read
    buffer: list[TokenExample] = attrs.field(factory=list)  # examples to draw from
    queue: deque[TokenExample] = attrs.field(factory=deque)  # examples that wait for room in the buffer
    left: TokenDataset = NOTHING  # the rest of documents that are cut into blocks
    samples: int = 0  # taken in this epoch
    epoch_samples: int | None = None  # of the epoch before
    supervised: int = 0  # tokens trained on so far
    rows: int = 0  # read in this epoch
    drops: Counter[str] = attrs.field(factory=Counter)  # of these rows, by reason
    bad: int = 0  # bad rows among them
    unrendered: Counter[str] = attrs.field(factory=Counter)  # parts of these rows that the template leaves out, by role
    taken: Counter[str] = attrs.field(factory=Counter)  # rows of each source in this epoch, by the source's number

    @property
    def passes(self) -> float:
        """Return the passes over the rows so far. Parts of a pass are known once one pass is complete."""
        part = self.samples / self.epoch_samples if self.epoch_samples else 0.0
        return self.epoch + min(part, math.nextafter(1.0, 0.0))

    def copy(self) -> Position:
        """Return a copy that shares the examples, which nobody changes."""
        return attrs.evolve(
            self,
            turns=[turn.copy() for turn in self.turns],
            buffer=list(self.buffer),
            queue=deque(self.queue),
            drops=Counter(self.drops),
            unrendered=Counter(self.unrendered),
            taken=Counter(self.taken),
        )

    def begin_epoch(self) -> None:
        """Move to the beginning of the next epoch."""
        self.epoch, self.turns, self.read, self.left = self.epoch + 1, [], False, NOTHING
        self.epoch_samples, self.samples, self.rows, self.bad = self.samples, 0, 0, 0
        self.drops, self.unrendered, self.taken = Counter(), Counter(), Counter()

    def state(self) -> dict[str, Any]:
        """Return the position as tensors and JSON values."""
        waiting = [example for turn in self.turns for example in turn.waiting]
        sets = {"buffer": self.buffer, "queue": self.queue, "waiting": waiting}
        tensors = {name: _tensors(TokenDataset.of(examples)) for name, examples in sets.items()}
        return {
            **{name: getattr(self, name) for name in COUNTS},
            "turns": [[*attrs.astuple(turn.place), turn.count, len(turn.waiting)] for turn in self.turns],
            "drops": dict(self.drops),
            "unrendered": dict(self.unrendered),
            "by_source": dict(self.taken),
            "left": _tensors(self.left),
            **tensors,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Position:
        """Return the position that `state` describes. Older checkpoints lack bad rows, turns and rows by source."""
        return cls(
            **{name: state.get(name, 0) for name in COUNTS},
            drops=Counter(state["drops"]),
            unrendered=Counter(state.get("unrendered", {})),
            taken=Counter(state.get("by_source", {})),
            turns=_turns(state),
            buffer=list(_dataset(state["buffer"])),
            queue=deque(_dataset(state["queue"])),
            left=_dataset(state["left"]),
        )


def _turns(state: Mapping[str, Any]) -> list[Turn]:
    if "turns" not in state:
        return [Turn(place=Place(*state["place"]))]
    waiting = iter(_dataset(state["waiting"]))
    return [
        Turn(place=Place(unit, row, times), count=count, waiting=deque(next(waiting) for _ in range(examples)))
        for unit, row, times, count, examples in state["turns"]
    ]


def _tensors(dataset: TokenDataset) -> dict[str, Any]:
    import torch

    def tensor(array: Any) -> Any:
        return None if array is None else torch.from_numpy(np.array(array))

    arrays = {name: tensor(getattr(dataset, name)) for name in ARRAYS}
    columns = {name: tensor(values) for name, values in dataset.columns.items()}
    return {**arrays, "where": list(dataset.where), "names": list(dataset.names), "columns": columns}


def _dataset(tensors: Mapping[str, Any]) -> TokenDataset:
    """Return the set that `_tensors` was given. Older checkpoints lack names, columns and index."""
    arrays: dict[str, Any] = {name: None if tensors.get(name) is None else tensors[name].numpy() for name in ARRAYS}
    columns = {name: values.numpy() for name, values in tensors.get("columns", {}).items()}
    return TokenDataset(**arrays, where=tuple(tensors["where"]), names=tuple(tensors.get("names", ())), columns=columns)
