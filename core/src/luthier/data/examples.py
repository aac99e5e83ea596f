"""What rows become: token examples, preference pairs, and compact sets of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

IGNORED = -100


@attrs.frozen(kw_only=True, eq=False)
class TokenExample:
    """One document, or several that belong together; `labels` are unshifted, IGNORED where not supervised."""

    input_ids: NDArray[np.int32]  # [L]
    labels: NDArray[np.int32]  # [L]
    weight: float = 1.0
    where: str = ""  # file:line it came from
    documents: NDArray[np.int64] | None = None  # where its documents begin; None: it is one

    @property
    def num_supervised(self) -> int:
        """Labels that can be predicted: the first token of a document never can."""
        counted = self.labels != IGNORED
        counted[self.starts] = False
        return int(counted.sum())

    @property
    def starts(self) -> NDArray[np.int64]:
        """[D]: the first token of each of its documents."""
        return np.zeros(1, np.int64) if self.documents is None else self.documents

    def apart(self) -> list[TokenExample]:
        """Its documents, each as an example of its own."""
        borders = [*self.starts.tolist(), len(self.input_ids)]
        spans = [slice(a, b) for a, b in pairwise(borders)]
        return [attrs.evolve(self, input_ids=self.input_ids[s], labels=self.labels[s], documents=None) for s in spans]


@attrs.frozen(kw_only=True, eq=False)
class TokenDataset(Sequence[TokenExample]):
    """Token examples in three flat arrays, so that a million rows are three allocations."""

    input_ids: NDArray[np.int32]  # [all tokens]
    labels: NDArray[np.int32]  # [all tokens]
    starts: NDArray[np.int64]  # [N+1]
    weights: NDArray[np.float32]  # [N]
    where: tuple[str, ...] = ()
    documents: NDArray[np.int64] | None = None  # the first token of every document; None: each example is one

    @classmethod
    def of(cls, examples: Sequence[TokenExample]) -> TokenDataset:
        empty = np.zeros(0, np.int32)
        starts = np.cumsum([0, *(len(e.input_ids) for e in examples)], dtype=np.int64)
        several = any(e.documents is not None for e in examples)
        inner = [start + e.starts for e, start in zip(examples, starts.tolist(), strict=False)] if several else []
        return cls(
            input_ids=np.concatenate([empty, *(e.input_ids for e in examples)]).astype(np.int32),
            labels=np.concatenate([empty, *(e.labels for e in examples)]).astype(np.int32),
            starts=starts,
            weights=np.array([e.weight for e in examples], np.float32),
            where=tuple(e.where for e in examples),
            documents=np.concatenate(inner).astype(np.int64) if several else None,
        )

    @classmethod
    def joined(cls, parts: Sequence[TokenDataset]) -> TokenDataset:
        """The examples of several sets, one after the other."""
        if len(parts) == 1:
            return parts[0]
        base = np.cumsum([0, *(len(p.input_ids) for p in parts)]).tolist()
        several = any(p.documents is not None for p in parts)
        return cls(
            input_ids=_concatenated([p.input_ids for p in parts], np.int32),
            labels=_concatenated([p.labels for p in parts], np.int32),
            starts=_concatenated([np.zeros(1), *(p.starts[1:] + at for p, at in _placed(parts, base))], np.int64),
            weights=_concatenated([p.weights for p in parts], np.float32),
            where=tuple(place for p in parts for place in p.where),
            documents=_concatenated([p.firsts + at for p, at in _placed(parts, base)], np.int64) if several else None,
        )

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: Any) -> TokenExample:
        span = slice(self.starts[index], self.starts[index + 1])
        where, documents = self.where[index] if self.where else "", None
        if self.documents is not None:
            first, last = np.searchsorted(self.documents, (span.start, span.stop))
            documents = self.documents[first:last] - span.start
        own = {"input_ids": self.input_ids[span], "labels": self.labels[span]}
        return TokenExample(**own, weight=float(self.weights[index]), where=where, documents=documents)

    def __iter__(self) -> Iterator[TokenExample]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @property
    def longest(self) -> int:
        """Tokens that no example has more of."""
        return int(self.lengths.max())

    def head(self, count: int) -> list[TokenExample]:
        """The first examples, at most `count`."""
        return [self[i] for i in range(min(count, len(self)))]

    def check(self, check: Callable[[TokenDataset], None]) -> None:
        """Call `check` on all of it; a stream is checked as it is read."""
        check(self)

    @property
    def num_supervised(self) -> NDArray[np.int64]:
        """[N]: the labels of each example that can be predicted."""
        counted = self.labels != IGNORED
        counted[self.firsts] = False
        total = np.concatenate([[0], np.cumsum(counted)])
        return total[self.starts[1:]] - total[self.starts[:-1]]

    @property
    def firsts(self) -> NDArray[np.int64]:
        """The first token of every document, in order."""
        return self.starts[:-1][self.lengths > 0] if self.documents is None else self.documents

    @property
    def fingerprint(self) -> str:
        """A hash of every token, label, length and weight, in order."""
        digest = hashlib.sha256()
        documents = () if self.documents is None else (self.documents,)
        for array in (self.input_ids, self.labels, self.starts, self.weights, *documents):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def _concatenated(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)


def _placed(parts: Sequence[TokenDataset], base: Sequence[int]) -> Iterator[tuple[TokenDataset, int]]:
    """Each set with the place of its first token."""
    return zip(parts, base, strict=False)


@attrs.frozen(kw_only=True)
class PreferenceExample:
    """Two answers to one prompt, as conversations; tokenised and trained by preference losses."""

    prompt: list[dict[str, Any]] | str
    chosen: list[dict[str, Any]] | str
    rejected: list[dict[str, Any]] | str
    where: str = ""
