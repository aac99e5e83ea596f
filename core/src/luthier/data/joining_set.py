"""A set that is joined of parts as they come, in little more memory than its tokens take."""

from __future__ import annotations

from typing import Final

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.examples import TokenDataset

ROOM: Final = 1 << 20  # the fewest tokens that room is made for
NOTHING: Final = np.zeros(0, np.int32)


class JoiningSet:
    """The parts of a set. Their tokens are copied at once to where they stay; collecting them takes twice as much."""

    def __init__(self) -> None:
        self._input_ids, self._labels = _Tokens(), _Tokens()
        self._others: list[TokenDataset] = []  # the parts without their tokens, placed in the whole

    def add(self, part: TokenDataset) -> None:
        """Add a part at the end."""
        at = self._input_ids.count
        self._input_ids.add(part.input_ids)
        self._labels.add(part.labels)
        documents = None if part.documents is None else part.documents + at
        self._others.append(
            attrs.evolve(part, input_ids=NOTHING, labels=NOTHING, starts=part.starts + at, documents=documents)
        )

    def whole(self) -> TokenDataset:
        """Return the set of all parts. Nothing can be added afterwards."""
        others = TokenDataset.joined(self._others or [TokenDataset.of(())])
        return attrs.evolve(others, input_ids=self._input_ids.whole(), labels=self._labels.whole())


class _Tokens:
    """An array that grows in place: the system moves its pages and copies nothing."""

    def __init__(self) -> None:
        self._array = np.zeros(0, np.int32)
        self.count = 0

    def add(self, tokens: NDArray[np.int32]) -> None:
        end = self.count + len(tokens)
        if end > len(self._array):
            self._array.resize(end + max(ROOM, end // 16), refcheck=False)
        self._array[self.count : end] = tokens
        self.count = end

    def whole(self) -> NDArray[np.int32]:
        self._array.resize(self.count, refcheck=False)
        return self._array
