"""The results of a preparation as plain data: examples in supervised and unsupervised pieces, drops and lengths."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.batches.shared_prompts import count_saved
from luthier.data.examples import IGNORED, TokenExample
from luthier.data.prepare import Prepared
from luthier.data.report import Report

Pieces = tuple[tuple[str, bool], ...]  # (text, True if it is supervised)


@attrs.frozen(kw_only=True)
class ShownDocument:
    """One document of a unit as the loss sees it."""

    name: str
    pieces: Pieces
    tokens: int
    supervised_tokens: int


@attrs.frozen(kw_only=True)
class Shown:
    """One unit as the loss sees it. `pieces` are those of its documents, one after another.

    `shared_tokens` is the number of tokens saved by computing a prompt only once that several documents begin with.
    """

    where: str
    documents: tuple[ShownDocument, ...]
    columns: dict[str, bool | int | float]
    weight: float = 1.0  # of its loss
    shared_tokens: int = 0

    @property
    def pieces(self) -> Pieces:
        return tuple(piece for document in self.documents for piece in document.pieces)

    @property
    def tokens(self) -> int:
        return sum(document.tokens for document in self.documents)

    @property
    def supervised_tokens(self) -> int:
        return sum(document.supervised_tokens for document in self.documents)

    def to_dict(self) -> dict[str, Any]:
        plain = attrs.asdict(self)
        own = {name: getattr(self, name) for name in ("tokens", "supervised_tokens")}
        return {**plain, **own, "pieces": [list(piece) for piece in self.pieces]}


@attrs.frozen(kw_only=True)
class Inspection:
    """Examples, and the report with drops by reason and length statistics."""

    examples: tuple[Shown, ...]
    report: Report
    chat_template_hash: str | None = None

    @property
    def supervised_share(self) -> float:
        return self.report.supervised_share

    def to_dict(self) -> dict[str, Any]:
        return {
            "examples": [shown.to_dict() for shown in self.examples],
            "supervised_share": self.supervised_share,
            "chat_template_hash": self.chat_template_hash,
            "report": self.report.to_dict(),
        }


def inspect(prepared: Prepared, tokenizer: Any, rows: int = 3) -> Inspection:
    """Return the first `rows` examples of the training set, and the report on all rows."""
    shown = tuple(_shown(example, tokenizer) for example in prepared.train.head(rows))
    return Inspection(examples=shown, report=prepared.report, chat_template_hash=prepared.chat_template_hash)


def _shown(example: TokenExample, tokenizer: Any) -> Shown:
    names = {number: name for name, number in example.named.items()}
    documents = tuple(
        _document(names.get(number, ""), example.input_ids[span], example.labels[span], tokenizer)
        for number, span in enumerate(example.spans)
    )
    saved = int(count_saved([example])[0])
    return Shown(where=example.where, documents=documents, columns=dict(example.columns),
                 weight=example.weight, shared_tokens=saved)  # fmt: skip


def _document(name: str, ids: NDArray[np.int32], labels: NDArray[np.int32], tokenizer: Any) -> ShownDocument:
    """Return the document's text, cut where supervision begins or ends. Its first token is never supervised."""
    on = labels != IGNORED
    on[:1] = False
    borders = [0, *(np.flatnonzero(on[1:] != on[:-1]) + 1).tolist(), len(on)]
    pieces = tuple(
        (tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False), bool(on[a]))
        for a, b in zip(borders, borders[1:], strict=False)
    )
    return ShownDocument(name=name, pieces=pieces, tokens=len(on), supervised_tokens=int(on.sum()))
