"""Labelled texts: the tokens and labels of many texts in flat arrays, one text after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.examples import IGNORED, TokenDataset, TokenExample
from luthier.data.tokenise.supervised_spans import Rendered, Span

Labelled = tuple[NDArray[np.int32], Sequence[Span]]  # the tokens of a text, and the ranges of those with labels


@attrs.frozen(kw_only=True)
class Whole:
    """A text that is the example of its row as it is: its number among the texts, and what the row says of it."""

    text: int
    row: int
    weight: float
    where: str


@attrs.frozen(kw_only=True, eq=False)
class LabelledTexts:
    """The tokens of several texts, one text after another, with unshifted labels."""

    input_ids: NDArray[np.int32]  # [T] of all texts
    labels: NDArray[np.int32]  # [T]
    starts: NDArray[np.int64]  # [N+1] the first token of each text

    @classmethod
    def of(cls, texts: Sequence[Labelled]) -> LabelledTexts:
        """Return the texts with labels for the tokens in their ranges."""
        ids = np.concatenate([np.zeros(0, np.int32), *(tokens for tokens, _ in texts)])
        starts = np.cumsum([0, *(len(tokens) for tokens, _ in texts)], dtype=np.int64)
        ranges = [(at + a, at + b) for at, (_, own) in zip(starts.tolist(), texts, strict=False) for a, b in own]
        opened = np.bincount([a for a, _ in ranges], minlength=len(ids) + 1)
        opened -= np.bincount([b for _, b in ranges], minlength=len(ids) + 1)
        labels = np.where(np.cumsum(opened[:-1]) > 0, ids, np.int32(IGNORED))
        return cls(input_ids=ids, labels=labels, starts=starts)

    def are_trainable(self, max_length: int | None) -> list[bool]:
        """Return of each text whether it is short enough and has a label that can be predicted; None: any will do."""
        lengths = np.diff(self.starts)
        if max_length is None:
            return [True] * len(lengths)
        counted = self.labels != IGNORED
        counted[self.starts[:-1][lengths > 0]] = False
        before = np.append(0, np.cumsum(counted))
        return ((lengths <= max_length) & (np.diff(before[self.starts]) > 0)).tolist()

    def example(self, number: int, text: Rendered) -> TokenExample:
        """Return one text as an example."""
        span = slice(self.starts[number], self.starts[number + 1])
        return TokenExample(
            input_ids=self.input_ids[span], labels=self.labels[span], weight=text.weight, where=text.where
        )

    def joined(self, examples: Sequence[Whole | TokenExample]) -> TokenDataset:
        """Return the set of some texts and of other examples, in this order."""
        if any(isinstance(one, TokenExample) and (one.documents is not None or one.columns) for one in examples):
            return TokenDataset.of([self._of_row(one) for one in examples])
        parts = []
        for _, run in groupby(examples, type):
            both = [*run]
            texts = [one for one in both if isinstance(one, Whole)]
            others = [one for one in both if isinstance(one, TokenExample)]
            parts.append(self._chosen(texts) if texts else TokenDataset.of(others))
        return TokenDataset.joined(parts or [TokenDataset.of(())])

    def _of_row(self, one: Whole | TokenExample) -> TokenExample:
        if isinstance(one, TokenExample):
            return one
        span = slice(self.starts[one.text], self.starts[one.text + 1])
        return TokenExample(
            input_ids=self.input_ids[span], labels=self.labels[span], weight=one.weight, where=one.where, index=one.row
        )

    def _chosen(self, texts: Sequence[Whole]) -> TokenDataset:
        """Return some texts, in rising order, as a set of examples."""
        numbers = np.array([one.text for one in texts])
        first, end = int(numbers[0]), int(numbers[-1]) + 1
        lengths = np.diff(self.starts[first : end + 1])
        tokens: slice | NDArray[np.int64] = slice(self.starts[first], self.starts[end])
        if len(texts) < end - first:
            is_chosen = np.isin(np.arange(first, end), numbers)
            tokens = self.starts[first] + np.flatnonzero(np.repeat(is_chosen, lengths))
            lengths = lengths[is_chosen]
        return TokenDataset(
            input_ids=self.input_ids[tokens],
            labels=self.labels[tokens],
            starts=np.append(0, np.cumsum(lengths)),
            weights=np.array([one.weight for one in texts], np.float32),
            where=tuple([one.where for one in texts]),
            index=np.array([one.row for one in texts], np.int64),
        )
