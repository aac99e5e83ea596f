"""Texts tokenised by the bytes of their tokens, which give every offset and prove the result without decoding.

The tokens of a byte-level tokenizer stand for bytes. If those of a text's tokens, joined, are the bytes of the text,
then they are what the tokens decode to, and where each token begins follows from their lengths. So the tokenizer can be
called without offsets, which takes it two thirds of the time.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.tokenise.supervised_spans import Rendered, Span

Heads = Callable[[set[str]], dict[str, list[int]]]  # from texts to the tokens that each has by itself


@attrs.frozen(eq=False)
class ByteTokens:
    """The bytes of every token of a tokenizer, with what decides where a span may begin."""

    tokenizer: Any
    core: Any  # the object of the library tokenizers
    table: list[bytes]
    lengths: NDArray[np.int64]  # [V] bytes of each token
    is_special: NDArray[np.bool_]  # [V]
    is_blank: NDArray[np.bool_]  # [V] True for tokens of only spaces, which some tokenizers give no offsets

    @classmethod
    def of(cls, tokenizer: Any, core: Any, specials: frozenset[int]) -> ByteTokens | None:
        """Return the table of a tokenizer; None if its tokens do not stand for bytes."""
        if type(core.decoder).__name__ != "ByteLevel" or not hasattr(core, "encode_batch_fast"):
            return None
        alphabet, table = _byte_alphabet(), [b""] * (1 + max(core.get_vocab().values(), default=-1))
        for text, token in core.get_vocab().items():
            table[token] = text.translate(alphabet).encode("latin-1", "ignore")
        for token, added in core.get_added_tokens_decoder().items():
            table[token] = added.content.encode()
        places = np.arange(len(table))
        return cls(
            tokenizer=tokenizer,
            core=core,
            table=table,
            lengths=np.array(list(map(len, table)), np.int64),
            is_special=np.isin(places, sorted(specials)),
            is_blank=np.array([not octets.strip(b" ") for octets in table], bool),
        )

    def encode(self, texts: Sequence[Rendered], alone: Heads) -> list[tuple[NDArray[np.int32], list[Span]] | None]:
        """Return the tokens of each text, and the range of tokens of each span.

        None stands for a text whose tokens do not prove it, or in which a span does not begin and end with tokens or
        follows a prompt that would have other tokens by itself. `alone` tokenises such prompts.
        """
        if not self._is_bare():
            return [None] * len(texts)
        raws = [text.text.encode() for text in texts]
        encoded = self.core.encode_batch_fast([text.text for text in texts], add_special_tokens=False)
        batch = Batch.of([encoding.ids for encoding in encoded], self.lengths)
        ranges: list[list[Span] | None] = [[] if proven else None for proven in self._prove(batch, raws)]
        spans = ByteSpans.of(texts, raws, batch.borders[batch.firsts].tolist(), ranges)
        if len(spans.rows):
            self._find_ranges(batch, raws, spans, ranges, alone)
        return [None if own is None else (ids, own) for ids, own in zip(batch.arrays(), ranges, strict=True)]

    def _is_bare(self) -> bool:
        """Return True if the tokenizer now encodes whole texts, as a call of it without special tokens would."""
        divides = getattr(self.tokenizer, "split_special_tokens", False)
        return self.core.truncation is None and self.core.padding is None and not divides

    def _prove(self, batch: Batch, raws: list[bytes]) -> list[bool]:
        """Return of each text whether the bytes of its tokens are its own."""
        written = b"".join(map(self.table.__getitem__, itertools.chain.from_iterable(batch.rows)))
        own_ends = np.cumsum(np.fromiter(map(len, raws), np.int64, len(raws)))
        if written == b"".join(raws) and np.array_equal(batch.borders[batch.firsts[1:]], own_ends):
            return [True] * len(raws)
        return [b"".join(map(self.table.__getitem__, ids)) == raw for ids, raw in zip(batch.rows, raws, strict=True)]

    def _find_ranges(
        self, batch: Batch, raws: list[bytes], spans: ByteSpans, ranges: list[list[Span] | None], alone: Heads
    ) -> None:
        """Add the range of tokens of every span to `ranges`; None for a text in which one has none."""
        first, end = np.searchsorted(batch.borders, spans.starts), np.searchsorted(batch.borders, spans.ends)
        is_exact = (batch.borders[first] == spans.starts) & (batch.borders[end] == spans.ends) & (end > first)
        last = np.maximum(end - 1, 0)
        is_exact &= ~(self.is_blank[batch.ids[first % len(batch.ids)]] | self.is_blank[batch.ids[last]])
        special = np.maximum.accumulate(np.where(self.is_special[batch.ids], np.arange(len(batch.ids)), -1))
        base = batch.firsts[spans.rows]
        # a head is the text from the last special token before a span, or from the text's beginning, up to the span
        at = np.maximum(np.where(first > 0, special[first - 1], -1), base)
        places = (first - base, end - base, at - base, batch.borders[at] - batch.borders[base],
                  spans.starts - batch.borders[base], is_exact)  # fmt: skip
        heads = []
        for row, a, b, begin, octet, stop, exact in zip(spans.rows, *(one.tolist() for one in places), strict=True):
            own = ranges[row]
            if own is None or not exact:
                ranges[row] = None
                continue
            own.append((a, b))
            if stop > octet:
                heads.append((row, raws[row][octet:stop], batch.rows[row][begin:a]))
        texts = {head: head.decode() for head in {head for _, head, _ in heads}}
        tokens = alone(set(texts.values()))
        for row, head, ids in heads:
            if tokens[texts[head]] != ids:
                ranges[row] = None


@attrs.frozen(eq=False)
class Batch:
    """The tokens of several texts, one text after another."""

    rows: list[list[int]]
    ids: NDArray[np.int64]  # [T] of all texts
    firsts: NDArray[np.int64]  # [N+1] the first token of each text
    borders: NDArray[np.int64]  # [T+1] the bytes before each token

    @classmethod
    def of(cls, rows: list[list[int]], lengths: NDArray[np.int64]) -> Batch:
        firsts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(firsts[-1]))
        return cls(rows, ids, firsts, np.append(0, np.cumsum(lengths[ids])))

    def arrays(self) -> list[NDArray[np.int32]]:
        """Return the tokens of each text."""
        ids, borders = self.ids.astype(np.int32), self.firsts.tolist()
        return [ids[a:b] for a, b in pairwise(borders)]


@attrs.frozen(eq=False)
class ByteSpans:
    """The supervised spans of several texts: the text of each, and its bytes among those of all texts."""

    rows: list[int]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(
        cls, texts: Sequence[Rendered], raws: Sequence[bytes], bases: Sequence[int], ranges: Sequence[object]
    ) -> ByteSpans:
        """Return the spans of the texts that have `ranges`. `bases` are the bytes before each text."""
        rows: list[int] = []
        places: list[int] = []
        for row, (text, raw) in enumerate(zip(texts, raws, strict=True)):
            base, is_ascii = bases[row], len(raw) == len(text.text)
            for start, end in text.spans if ranges[row] is not None else ():
                rows.append(row)
                places.append(base + (start if is_ascii else len(text.text[:start].encode())))
                places.append(base + (end if is_ascii else len(text.text[:end].encode())))
        both = np.array(places, np.int64)
        return cls(rows, both[::2], both[1::2])


def _byte_alphabet() -> dict[int, int]:
    """Return the byte that each character of a byte-level token stands for, as GPT-2 assigns them.

    Printable characters of Latin-1 stand for themselves, and the other bytes in order for characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [octet for octet in range(256) if octet not in printable]
    return {octet: octet for octet in printable} | {256 + place: octet for place, octet in enumerate(others)}


def find_core(tokenizer: Any) -> Any:
    """Return the object of the library tokenizers that a tokenizer calls without changing anything; None if unknown."""
    from luthier.data.tokenise.plain.file_tokenizer import FileTokenizer

    if isinstance(tokenizer, FileTokenizer):
        return tokenizer.core
    transformers = sys.modules.get("transformers")  # loaded already if the tokenizer is one of transformers'
    if transformers is None or not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        return None
    calls = ("__call__", "_encode_plus", "_batch_encode_plus", "batch_encode_plus")
    own, fast = type(tokenizer), transformers.PreTrainedTokenizerFast
    is_plain = all(getattr(own, name, None) is getattr(fast, name, None) for name in calls)
    return tokenizer.backend_tokenizer if is_plain else None
