"""Blocks: documents joined and cut into pieces of one size for pretraining, what is left over carried on."""

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
    """Cuts what is added into blocks of `size` tokens; no token is lost, and none comes twice.

    A block is one example. Its documents stay apart: attention does not cross from one to the next, positions begin
    anew in each, and so does what is left of a document that the block before cut. The first token of each such piece
    has nothing to be predicted from and is not supervised.
    """

    size: int
    left: TokenDataset = NOTHING  # documents, and at its start perhaps the rest of one, fewer than `size` tokens in all

    def add(self, documents: TokenDataset) -> TokenDataset:
        """The blocks that are full now."""
        whole = TokenDataset.joined([self.left, documents])
        count = len(whole.input_ids) // self.size
        self.left = _rest(whole, count * self.size)
        return _cut(whole, np.arange(count + 1, dtype=np.int64) * self.size)

    def end(self) -> TokenDataset:
        """What is left, as one last and shorter block, or none."""
        whole, self.left = self.left, NOTHING
        return _cut(whole, np.unique([0, len(whole.input_ids)]).astype(np.int64))


def _cut(whole: TokenDataset, borders: np.ndarray) -> TokenDataset:
    """The tokens between the borders as examples, under the place of the document that each begins with."""
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
    """The documents after a border, the one that it cuts included."""
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
