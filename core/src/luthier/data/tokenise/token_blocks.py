"""Blocks for pretraining: documents are joined and cut into pieces of one size; the rest goes into the next block."""

from __future__ import annotations

import attrs
import numpy as np

from luthier.data.examples import TokenDataset

NOTHING = TokenDataset(
    input_ids=np.zeros(0, np.int32),
    labels=np.zeros(0, np.int32),
    starts=np.zeros(1, np.int64),
    weights=np.zeros(0, np.float32),
)


@attrs.define(kw_only=True)
class Blocks:
    """A cutter of documents into blocks of `size` tokens. No token is lost, and none comes twice.

    A block is one example. Its documents stay separate: attention does not cross from one to the next, and positions
    begin at 0 in each, also in the rest of a document that the block before has cut. The first token of each such piece
    has nothing that predicts it and is not supervised.
    """

    size: int
    left: TokenDataset = NOTHING  # documents of fewer than `size` tokens in all; the first may be the rest of one

    def add(self, documents: TokenDataset) -> TokenDataset:
        """Return the blocks that are now full."""
        whole = TokenDataset.joined([self.left, documents])
        count = len(whole.input_ids) // self.size
        self.left = _rest(whole, count * self.size)
        return _cut(whole, np.arange(count + 1, dtype=np.int64) * self.size)

    def end(self) -> TokenDataset:
        """Return the rest as one last, shorter block, or no block."""
        whole, self.left = self.left, NOTHING
        return _cut(whole, np.unique([0, len(whole.input_ids)]).astype(np.int64))


def _cut(whole: TokenDataset, borders: np.ndarray) -> TokenDataset:
    """Return the tokens between the borders as examples, each with the place of its first document."""
    end, begins = int(borders[-1]), borders[:-1]
    at = np.searchsorted(whole.starts, begins, side="right") - 1
    return TokenDataset(
        input_ids=whole.input_ids[:end],
        labels=whole.labels[:end],
        starts=borders,
        weights=np.ones(len(begins), np.float32),
        where=tuple(whole.where[i] for i in at.tolist()),
        documents=np.union1d(whole.starts[:-1][whole.starts[:-1] < end], begins),
        index=None if whole.index is None else whole.index[at],
    )


def _rest(whole: TokenDataset, border: int) -> TokenDataset:
    """Return the documents after a border, including the rest of the one that it cuts."""
    first = int(np.searchsorted(whole.starts, border, side="right")) - 1
    starts = np.maximum(whole.starts[first:] - border, 0)
    if border >= len(whole.input_ids):
        return NOTHING
    return TokenDataset(
        input_ids=whole.input_ids[border:].copy(),
        labels=whole.labels[border:].copy(),
        starts=starts,
        weights=whole.weights[first:],
        where=whole.where[first:],
        index=None if whole.index is None else whole.index[first:],
    )
