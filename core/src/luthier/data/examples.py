"""The results of tokenising rows: token examples, each one unit, and compact sets of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import attrs
import numpy as np
from numpy.typing import NDArray

IGNORED = -100
COUNTED: Final = 1 << 16  # the number of examples whose supervised tokens are counted at a time


@attrs.frozen(kw_only=True, eq=False)
class TokenExample:
    """One unit: a document, or several that belong together.

    `labels` are unshifted, and IGNORED where not supervised.
    """

    input_ids: NDArray[np.int32]  # [L]
    labels: NDArray[np.int32]  # [L]
    weight: float = 1.0
    where: str = ""  # file:line of the row
    documents: NDArray[np.int64] | None = None  # the first token of each document; None: the example is one document
    # the documents' names, "" for none; empty: no document has a name, or the only one is "text"
    names: tuple[str, ...] = ()
    continues: tuple[int, ...] = ()  # the document that each document follows, -1 for none; empty: none follows another
    columns: Mapping[str, bool | int | float] = attrs.field(factory=dict)
    index: int | None = None  # the number of the row in the data, from 0; None: not known

    @property
    def num_supervised(self) -> int:
        """Return the number of labels that can be predicted. The first token of a document never can."""
        counted = self.labels != IGNORED
        if len(counted):  # a tokenizer may make nothing of a text
            counted[self.heads] = False
        return int(counted.sum())

    @property
    def starts(self) -> NDArray[np.int64]:
        """Return [D], the first token of each document."""
        return np.zeros(1, np.int64) if self.documents is None else self.documents

    @property
    def heads(self) -> NDArray[np.int64]:
        """Return the first token of each document that continues none; nothing predicts it."""
        return self.starts[np.array(self.continues) < 0] if self.continues else self.starts

    @property
    def named(self) -> dict[str, int]:
        """Return the number of each document that has a name."""
        alone = ("text",) if self.documents is None else ()
        return {name: number for number, name in enumerate(self.names or alone) if name}

    @property
    def spans(self) -> list[slice]:
        """Return [D], the slice of tokens of each document."""
        return [slice(a, b) for a, b in pairwise([*self.starts.tolist(), len(self.input_ids)])]

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest document."""
        return max(span.stop - span.start for span in self.spans)

    def by_name(self) -> dict[str, TokenExample]:
        """Return its documents that have names, each as an example of its own."""
        spans = self.spans
        return {
            name: attrs.evolve(
                self, input_ids=self.input_ids[spans[i]], labels=self.labels[spans[i]], documents=None, names=()
            )
            for name, i in self.named.items()
        }

    def of_row(self, where: str, columns: Mapping[str, bool | int | float], index: int, weight: float) -> TokenExample:
        """Return this example as the unit of a row. The row's weight multiplies the example's own."""
        return TokenExample(
            input_ids=self.input_ids, labels=self.labels, weight=self.weight * weight, where=where,
            documents=self.documents, names=self.names, continues=self.continues, columns=columns, index=index,
        )  # fmt: skip

    @classmethod
    def joined(cls, documents: Mapping[str, TokenExample]) -> TokenExample:
        """Return the unit that consists of these documents. Weight, place, columns and index are those of the first."""
        first, lengths = next(iter(documents.values())), [len(e.input_ids) for e in documents.values()]
        if len(documents) == 1 and "text" in documents:
            return first
        return attrs.evolve(
            first,
            input_ids=np.concatenate([e.input_ids for e in documents.values()]),
            labels=np.concatenate([e.labels for e in documents.values()]),
            documents=np.cumsum([0, *lengths[:-1]], dtype=np.int64),
            names=tuple(documents),
        )


@attrs.frozen(kw_only=True, eq=False)
class TokenDataset(Sequence[TokenExample]):
    """A sequence of token examples stored in three flat arrays, so that a million rows need three allocations."""

    input_ids: NDArray[np.int32]  # [all tokens]
    labels: NDArray[np.int32]  # [all tokens]
    starts: NDArray[np.int64]  # [N+1]
    weights: NDArray[np.float32]  # [N]
    where: tuple[str, ...] = ()
    documents: NDArray[np.int64] | None = None  # the first token of every document; None: each example is one document
    names: tuple[str, ...] = ()  # the documents' names, in order, the same for every example; empty as in TokenExample
    columns: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)  # [N] each
    # [N] the number of each example's row; None: the example's own number. It hides the search method of Sequence.
    index: NDArray[np.int64] | None = None  # type: ignore[assignment]

    @classmethod
    def of(cls, examples: Sequence[TokenExample]) -> TokenDataset:
        """Return the set of these examples. Their documents and columns must have the same names."""
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
            names=examples[0].names if examples else (),
            columns=column_arrays(examples),
            index=None if any(e.index is None for e in examples) else np.array([e.index for e in examples], np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[TokenDataset]) -> TokenDataset:
        """Return the examples of several sets, one set after another."""
        if len(parts) == 1:
            return parts[0]
        parts = [part for part in parts if len(part)] or parts[:1]
        base = np.cumsum([0, *(len(p.input_ids) for p in parts)]).tolist()
        several = any(p.documents is not None for p in parts)
        known = [p.index for p in parts if p.index is not None]
        return cls(
            input_ids=_concatenated([p.input_ids for p in parts], np.int32),
            labels=_concatenated([p.labels for p in parts], np.int32),
            starts=_concatenated([np.zeros(1), *(p.starts[1:] + at for p, at in _placed(parts, base))], np.int64),
            weights=_concatenated([p.weights for p in parts], np.float32),
            where=tuple(place for p in parts for place in p.where),
            documents=_concatenated([p.firsts + at for p, at in _placed(parts, base)], np.int64) if several else None,
            names=parts[0].names,
            columns={name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
            index=_concatenated(known, np.int64) if len(known) == len(parts) else None,
        )

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: Any) -> TokenExample:  # type: ignore[override]  # a slice is never asked for
        span = slice(self.starts[index], self.starts[index + 1])
        where, documents = self.where[index] if self.where else "", None
        if self.documents is not None:
            first, last = np.searchsorted(self.documents, (span.start, span.stop))
            documents = self.documents[first:last] - span.start
        return TokenExample(
            input_ids=self.input_ids[span],
            labels=self.labels[span],
            weight=float(self.weights[index]),
            where=where,
            documents=documents,
            names=self.names,
            columns={name: values[index].item() for name, values in self.columns.items()},
            index=int(index) if self.index is None else int(self.index[index]),
        )

    def __iter__(self) -> Iterator[TokenExample]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @property
    def document_lengths(self) -> dict[str, NDArray[np.int64]]:
        """Return [N] for each name of a document: its tokens in each example."""
        borders = np.append(self.firsts, len(self.input_ids))
        return dict(zip(self.names, np.diff(borders).reshape(-1, len(self.names)).T, strict=True)) if self.names else {}

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest example."""
        return int(self.lengths.max())

    @property
    def longest_document(self) -> int:
        """Return the number of tokens of the longest document. An example of a pair has two."""
        return int(np.diff(np.append(self.firsts, len(self.input_ids))).max())

    def renumbered(self, numbers: NDArray[np.int64]) -> TokenDataset:
        """Return the same examples, each index replaced by the entry of `numbers` at that place."""
        return self if self.index is None else attrs.evolve(self, index=numbers[self.index])

    def head(self, count: int) -> list[TokenExample]:
        """Return the first examples, at most `count`."""
        return [self[i] for i in range(min(count, len(self)))]

    def check(self, check: Callable[[TokenDataset], None]) -> None:
        """Call `check` on the whole set. A stream, in contrast, is checked as it is read."""
        check(self)

    @property
    def num_supervised(self) -> NDArray[np.int64]:
        """Return [N], the number of labels of each example that can be predicted."""
        counted = self.labels != IGNORED
        counted[self.firsts] = False
        counts = np.zeros(len(self), np.int64)
        for first in range(0, len(self), COUNTED):  # a few at a time, because the sums take eight bytes per token
            starts = self.starts[first : first + COUNTED + 1]
            total = np.cumsum(counted[starts[0] : starts[-1]], dtype=np.int64)
            counts[first : first + COUNTED] = np.diff(np.append(0, total)[starts - starts[0]])
        return counts

    @property
    def firsts(self) -> NDArray[np.int64]:
        """Return the first token of every document, in order."""
        return self.starts[:-1][self.lengths > 0] if self.documents is None else self.documents

    @property
    def fingerprint(self) -> str:
        """Return a hash of every token, label, length, weight, name and column, in order."""
        digest = hashlib.sha256()
        documents = () if self.documents is None else (self.documents,)
        for array in (self.input_ids, self.labels, self.starts, self.weights, *documents, *self.columns.values()):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(repr((self.names, tuple(self.columns))).encode() if self.names or self.columns else b"")
        return digest.hexdigest()[:16]


def _concatenated(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)


def _placed(parts: Sequence[TokenDataset], base: Sequence[int]) -> Iterator[tuple[TokenDataset, int]]:
    """Yield each set together with the place of its first token."""
    return zip(parts, base, strict=False)


def column_arrays(examples: Sequence[TokenExample]) -> dict[str, NDArray[Any]]:
    """Return each column as an array [N] of bool, int64 or float32."""
    names = examples[0].columns if examples else ()
    made = {name: np.array([e.columns[name] for e in examples]) for name in names}
    return {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in made.items()}


def are_equal(example: TokenExample, one: str, other: str) -> bool:
    """Return True if two named documents of a unit consist of the same tokens."""
    spans, named = example.spans, example.named
    return np.array_equal(example.input_ids[spans[named[one]]], example.input_ids[spans[named[other]]])
