"""Documents of a packed row: how attention is told of them, and which of them it computes together."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import attrs

if TYPE_CHECKING:
    from luthier.data.batches.batch import Batch

# lengths up to this are rounded up to COARSE, longer ones to FINE, so that equal shapes are computed together
SHORT: Final = 128
COARSE, FINE = 32, 16  # and few kernels are needed; causal attention ignores padding at the end
TOGETHER: Final = 256  # keys of short documents that are computed at once

_TOLD: ContextVar[dict[str, Any] | None] = ContextVar("documents", default=None)


Span = tuple[int, int]  # [first, last)


@attrs.frozen
class Document:
    """Queries [start, stop) of a row, and the spans of keys that they attend to, their own keys last.

    Keys are counted from the first key of a prefix, if there is one, and queries from the first token.
    """

    start: int
    stop: int
    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def known(self) -> int:
        """Number of keys before its own: those of a prefix, and of the documents that it continues."""
        return sum(stop - start for start, stop in self.spans[:-1])


@attrs.frozen
class Bucket:
    """Documents of about one length, padded to `length`, with equally many known keys each."""

    length: int
    documents: tuple[Document, ...]

    @property
    def known(self) -> int:
        return self.documents[0].known


def document_arguments(batch: Batch) -> dict[str, Any]:
    """Return what tells a transformers model, and through it `attend_documents`, where the documents are."""
    import torch

    starts = batch.document_starts.to(torch.int32)
    longest = int(batch.lengths.max()) if batch.num_documents else 0
    arguments = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return arguments if int(batch.continues.max()) < 0 else {**arguments, "continues": batch.continues}


@contextmanager
def documents_told(arguments: dict[str, Any]) -> Iterator[None]:
    """Tell attention about the documents within this context, though an architecture passes no arguments on."""
    token = _TOLD.set(arguments)
    try:
        yield
    finally:
        _TOLD.reset(token)


def aside_documents() -> dict[str, Any]:
    """Return what `documents_told` tells."""
    return _TOLD.get() or {}


@functools.lru_cache(maxsize=64)
def cut_documents(starts: tuple[int, ...], continues: tuple[int, ...] | None, prefix: int = 0) -> tuple[Document, ...]:
    """Return the documents between starts [D+1]; `prefix` keys stand before each one that continues none."""
    own = [(start + prefix, stop + prefix) for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    documents = []
    for d, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        before: list[Span] = []
        parent = -1 if continues is None else continues[d]
        while parent >= 0:
            before.insert(0, own[parent])
            parent = continues[parent]  # type: ignore[index]
        spans = ((0, prefix), *before, own[d])
        documents.append(Document(start, stop, tuple(span for span in spans if span[0] < span[1])))
    return tuple(d for d in documents if d.length)


@functools.lru_cache(maxsize=64)
def make_buckets(documents: tuple[Document, ...]) -> tuple[Bucket, ...]:
    """Return the documents that are computed together: no more than TOGETHER keys, or one document."""
    alike: dict[tuple[int, int], list[Document]] = defaultdict(list)
    for document in documents:
        alike[_padded(document), document.known].append(document)
    made = []
    for (length, known), members in sorted(alike.items(), key=lambda item: item[0]):
        size = max(TOGETHER // (length + known), 1)
        made += [Bucket(length, tuple(members[i : i + size])) for i in range(0, len(members), size)]
    return tuple(made)


def _padded(document: Document) -> int:
    grain = COARSE if document.length <= SHORT else FINE
    return -(-document.length // grain) * grain
