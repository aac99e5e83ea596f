"""What a preparation made, as plain data: examples in supervised and unsupervised pieces, drops and lengths."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np

from luthier.data.examples import IGNORED, PreferenceExample, TokenExample
from luthier.data.prepare import Prepared
from luthier.data.report import Report

Pieces = tuple[tuple[str, bool], ...]  # text, and whether it is supervised


@attrs.frozen(kw_only=True)
class Shown:
    """One example as the loss sees it; of a preference pair `pieces` are prompt, chosen and `rejected`."""

    where: str
    pieces: Pieces
    tokens: int = 0
    supervised_tokens: int = 0
    rejected: str | None = None


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
        examples = [attrs.asdict(shown) for shown in self.examples]
        return {
            "examples": [{**shown, "pieces": [list(piece) for piece in shown["pieces"]]} for shown in examples],
            "supervised_share": self.supervised_share,
            "chat_template_hash": self.chat_template_hash,
            "report": self.report.to_dict(),
        }


def inspect(prepared: Prepared, tokenizer: Any, rows: int = 3) -> Inspection:
    """The first `rows` examples of the training set, and what became of all rows."""
    train = prepared.train
    pairs = isinstance(train, tuple)
    first = train[:rows] if pairs else train.head(rows)
    shown = tuple(_pair(e) if pairs else _tokens(e, tokenizer) for e in first)
    return Inspection(examples=shown, report=prepared.report, chat_template_hash=prepared.chat_template_hash)


def _tokens(example: TokenExample, tokenizer: Any) -> Shown:
    """The example's text, cut where supervision begins or ends; a document's first token is never supervised."""
    on = example.labels != IGNORED
    on[example.starts] = False
    borders = [0, *(np.flatnonzero(on[1:] != on[:-1]) + 1).tolist(), len(on)]
    pieces = tuple(
        (tokenizer.decode(example.input_ids[a:b].tolist(), skip_special_tokens=False), bool(on[a]))
        for a, b in zip(borders, borders[1:], strict=False)
    )
    return Shown(where=example.where, pieces=pieces, tokens=len(on), supervised_tokens=example.num_supervised)


def _pair(example: PreferenceExample) -> Shown:
    pieces = ((_text(example.prompt), False), (_text(example.chosen), True))
    return Shown(where=example.where, pieces=pieces, rejected=_text(example.rejected))


def _text(side: list[dict[str, Any]] | str) -> str:
    return side if isinstance(side, str) else "\n".join(f"{m['role']}: {m['content']}" for m in side)
