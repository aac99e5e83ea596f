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
    from luthier.engine.batch import Batch

SHORT: Final = 128  # lengths up to this are rounded up to COARSE, longer ones to FINE: equal shapes go together,
COARSE, FINE = 32, 16  # and few shapes need few kernels. Causal attention ignores what is padded at the end.
TOGETHER: Final = 256  # tokens of short documents that are computed at once

_TOLD: ContextVar[dict[str, Any] | None] = ContextVar("documents", default=None)


@attrs.frozen
class Document:
    """Tokens [start, stop) and, in `before`, the spans of the documents that it continues, the first one first."""

    start: int
    stop: int
    before: tuple[tuple[int, int], ...] = ()

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def known(self) -> int:
        """Tokens before its own that it attends to."""
        return sum(stop - start for start, stop in self.before)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """All that it attends to, its own tokens last."""
        return (*self.before, (self.start, self.stop))


@attrs.frozen
class Bucket:
    """Documents of about one length, padded to `length`; one that continues others is alone."""

    length: int
    documents: tuple[Document, ...]

    @property
    def known(self) -> int:
        return self.documents[0].known


def document_arguments(batch: Batch) -> dict[str, Any]:
    """What tells a transformers model, and through it `attend`, where the documents are."""
    import torch

    starts = batch.document_starts.to(torch.int32)
    longest = int(batch.lengths.max()) if batch.num_documents else 0
    told = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return told if int(batch.continues.max()) < 0 else {**told, "continues": batch.continues}


@contextmanager
def documents_told(told: dict[str, Any]) -> Iterator[None]:
    """Inside it attention knows of the documents although an architecture does not pass its arguments on."""
    token = _TOLD.set(told)
    try:
        yield
    finally:
        _TOLD.reset(token)


def aside() -> dict[str, Any]:
    """What `documents_told` tells."""
    return _TOLD.get() or {}


@functools.lru_cache(maxsize=64)
def documents(starts: tuple[int, ...], continues: tuple[int, ...] | None) -> tuple[Document, ...]:
    """The documents between starts [D+1], each with those that it continues."""
    spans = list(zip(starts[:-1], starts[1:], strict=True))
    found = []
    for d, (start, stop) in enumerate(spans):
        before: list[tuple[int, int]] = []
        parent = -1 if continues is None else continues[d]
        while parent >= 0:
            before.insert(0, spans[parent])
            parent = continues[parent]  # type: ignore[index]
        found.append(Document(start, stop, tuple(before)))
    return tuple(d for d in found if d.length)


@functools.lru_cache(maxsize=64)
def buckets(found: tuple[Document, ...]) -> tuple[Bucket, ...]:
    """Documents that are computed together, none more than TOGETHER tokens with others."""
    alike: dict[int, list[Document]] = defaultdict(list)
    for document in found:
        alike[_padded(document)].append(document)
    made = []
    for length, members in sorted(alike.items()):
        alone = [d for d in members if d.before]
        free = [d for d in members if not d.before]
        size = max(TOGETHER // length, 1)
        made += [Bucket(length, (d,)) for d in alone]
        made += [Bucket(length, tuple(free[i : i + size])) for i in range(0, len(free), size)]
    return tuple(made)


def _padded(document: Document) -> int:
    grain = COARSE if document.length <= SHORT else FINE
    return -(-document.length // grain) * grain
