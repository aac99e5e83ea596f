"""Turns: the rows of a stream's sources, taken so that each source has its share at every point of an epoch."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

import attrs
import numpy as np

from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.stream.source_lines import Line, Place
from luthier.errors import LuthierError

ROWS: Final = 64  # rows that are taken together

# reads the next rows of the line with this number; None at its end
Fetch = Callable[[int], TokenDataset | None]


@attrs.define(kw_only=True, eq=False)
class Turn:
    """Where one line is: what was read of it, the rows taken in this epoch, and the examples that wait."""

    place: Place = Place()
    count: int = 0
    waiting: deque[TokenExample] = attrs.field(factory=deque)

    def copy(self) -> Turn:
        return attrs.evolve(self, waiting=deque(self.waiting))


@attrs.define(kw_only=True, eq=False)
class Turns:
    """The taking of rows from the lines of an epoch.

    The row that comes next is that of the line whose share asks for it first. After n rows each line thus has its share
    of n, to a row. An epoch ends with a line that has no more rows: the others then have as many rows as if the same
    data had been mixed in memory.
    """

    lines: Sequence[Line]
    turns: Sequence[Turn]
    fetch: Fetch
    taken: Counter[str]  # rows of each source, by its number
    ended: set[int] = attrs.field(factory=set)

    def take(self) -> TokenDataset | None:
        """Return the examples of the next rows; None at the epoch's end."""
        if len(self.lines) == 1:
            return self._whole_part()
        taken: list[TokenExample] = []
        count = 0
        while count < ROWS and (line := self._next()) is not None:
            taken += self._row(line)
            count += 1
        return TokenDataset.of(taken) if taken else None

    def _next(self) -> int | None:
        """Return the line whose turn it is."""
        for number in range(len(self.lines)):
            self._read(number)
        shares = [line.share for line in self.lines]
        whole = min((self.turns[n].count / shares[n] for n in self.ended), default=math.inf)  # rows of the epoch
        due = [n for n, turn in enumerate(self.turns) if whole == math.inf or turn.count < round(shares[n] * whole)]
        return min(due, key=lambda n: ((self.turns[n].count + 0.5) / shares[n], n), default=None)

    def _read(self, number: int) -> None:
        """Read the line up to its next row, unless it has ended."""
        turn, started = self.turns[number], self.turns[number].place.times
        while not turn.waiting and number not in self.ended:
            examples = self.fetch(number)
            if examples is None:
                self.ended.add(number)
            else:
                turn.waiting.extend(examples)
            if not turn.waiting and turn.place.times > started + 1:
                problem = "no row of this source is left, so that it cannot have its share"
                raise LuthierError("data-empty", problem, where=self.lines[number].path)

    def _whole_part(self) -> TokenDataset | None:
        """Return the only line's next rows, which are of one file."""
        examples = self.fetch(0)
        if examples is not None and examples.index is not None and len(examples):
            rows = np.unique(examples.index)
            self.taken[self.lines[0].source_of(int(rows[0]))] += len(rows)
        return examples

    def _row(self, line: int) -> list[TokenExample]:
        """Return all examples of a line's next row."""
        turn = self.turns[line]
        row = [turn.waiting.popleft()]
        while turn.waiting and turn.waiting[0].index == row[0].index:
            row.append(turn.waiting.popleft())
        turn.count += 1
        self.taken[self.lines[line].source_of(row[0].index or 0)] += 1
        return row
