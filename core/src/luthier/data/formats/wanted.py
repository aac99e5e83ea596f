"""The demands of a loss on the rows: their kind, and the columns and texts that its batches carry."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.data.read.columns import advise_columns
from luthier.data.read.row import Row
from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.registry import installed_plugins

if TYPE_CHECKING:
    from luthier.recipe.parts import Part

KINDS: Final = ("tokens", "preference", "unpaired", "documents")
LISTED: Final = 6  # the most losses that an error names
NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@attrs.frozen(kw_only=True)
class Wanted:
    """The kind of rows that a loss takes, with the columns {name: type} and documents {name: column} of its record.

    The kind "any" is for looking at rows: it means the kind of the first source.
    """

    kind: str = "tokens"
    columns: Mapping[str, str] = attrs.field(factory=dict)
    documents: Mapping[str, str] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        unknown = {name: kind for name, kind in self.columns.items() if kind not in READERS}
        if unknown:
            remedy = f"A column is one of: {', '.join(READERS)}."
            raise LuthierError("plugin-invalid", "no such type of column", where="loss", found=unknown, remedy=remedy)
        if self.kind not in (*KINDS, "any"):
            remedy = f"A loss takes one of: {', '.join(KINDS)}."
            raise LuthierError("plugin-invalid", "no such kind of rows", where="loss", found=self.kind, remedy=remedy)
        if self.kind == "documents" and not self.documents:
            remedy = "Let LossRecord.documents name the columns whose texts become documents."
            raise LuthierError("plugin-invalid", "the loss takes documents but names none", where="loss", remedy=remedy)

    @property
    def reads_columns(self) -> bool:
        """Return True if the loss reads more of a row than its format."""
        return bool(self.columns or self.documents) or self.kind == "unpaired"

    @classmethod
    def of_part(cls, part: Part) -> Wanted:
        """Return the demands in a loss's record, or in the attributes of an object that was passed in Python."""
        loss: Any = part.record or part.local
        columns, documents = getattr(loss, "columns", {}), getattr(loss, "documents", {})
        return cls(kind=loss.data, columns=dict(columns), documents=dict(documents))

    def read_columns(self, row: Row) -> dict[str, bool | int | float]:
        """Return the row's checked value of each column. Raises `data-column` if the row lacks one."""
        values = {
            name: READERS[kind](_value_of(row, name), f"{row.where}: {name}") for name, kind in self.columns.items()
        }
        if self.kind == "unpaired" and "label" not in values:
            return {"label": _read_verdict(_value_of(row, "label"), f"{row.where}: label"), **values}
        return values

    def read_texts(self, row: Row) -> dict[str, str]:
        """Return the texts of the row that become documents of its unit, by name."""
        texts = {name: _value_of(row, column) for name, column in self.documents.items()}
        for name, value in texts.items():
            if not isinstance(value, str):
                where = f"{row.where}: {self.documents[name]}"
                raise LuthierError("data-row", "must be text", where=where, found=value)
        return texts


def advise_losses(kind: str) -> str:
    """Return the advice to choose an installed loss that takes rows of a kind, those without a prefix first."""
    offers = [offer for offer in installed_plugins().offers("loss") if getattr(offer.record, "data", "") == kind]
    if not offers:
        return "install a loss that takes these"
    offers.sort(key=lambda offer: ("." in offer.record.name, offer.source.distribution != "luthier"))
    names = [offer.record.name for offer in offers]
    return f"choose a loss that takes these: {', '.join(names[:LISTED])}{', ...' * (len(names) > LISTED)}"


def _value_of(row: Row, name: str) -> Any:
    if row.values.get(name) is not None:
        return row.values[name]
    if name in row.values:
        problem, remedy = f"column {name!r} is empty, but the loss reads it", "Give the row a value."
        raise LuthierError("data-column", problem, where=row.where, remedy=remedy)
    hint = suggest_nearest(name, sorted(row.values))
    remedy = f"{hint} Map another one with {advise_columns(f'{name}: COLUMN')}."
    raise LuthierError(
        "data-column", f"there is no column {name!r}, which the loss reads", where=row.where, remedy=remedy
    )


def _read_bool(value: Any, where: str) -> bool:
    """Return a truth value. A text is read only as CSV writes it, and a number never."""
    text = value.lower() if isinstance(value, str) else None
    if text in ("true", "false"):
        return text == "true"
    if isinstance(value, bool):
        return value
    raise LuthierError("data-row", "must be true or false", where=where, found=value)


def _read_verdict(value: Any, where: str) -> bool:
    """Return the verdict on an answer, which many data sets give as 1 or 0, as numbers or texts.

    Other numbers are ratings, for which no threshold is obvious.
    """
    number = float(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return _read_bool(value, where)
    if number in (0, 1):
        return number == 1
    remedy = "Write true or 1 for a good answer, false or 0 for a bad one; from ratings, make such a column yourself."
    raise LuthierError("data-row", "must be true or false, or 1 or 0", where=where, found=value, remedy=remedy)


def _read_int(value: Any, where: str) -> int:
    text = value.strip() if isinstance(value, str) else ""
    number = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else value
    if isinstance(number, int) and not isinstance(number, bool) and abs(number) < 2**63:
        return number
    raise LuthierError("data-row", "must be a whole number", where=where, found=value)


def _read_float(value: Any, where: str) -> float:
    text = value.strip() if isinstance(value, str) else ""
    number = float(text) if NUMBER.fullmatch(text) else value
    if isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number):
        return float(number)
    raise LuthierError("data-row", "must be a finite number", where=where, found=value)


READERS: Final[Mapping[str, Callable[[Any, str], Any]]] = {"bool": _read_bool, "int": _read_int, "float": _read_float}
TOKENS: Final = Wanted()
