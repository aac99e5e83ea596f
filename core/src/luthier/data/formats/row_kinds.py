"""The kinds of rows that losses take: whether a format's rows are of the wanted kind, and which losses take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from luthier.data.formats.recognise_form import FORMATS
from luthier.data.formats.wanted import advise_losses
from luthier.data.read.row import Row
from luthier.errors import LuthierError

SAID: Final = {
    "tokens": "text or conversations",
    "preference": "preference pairs",
    "unpaired": "answers with a verdict",
}
GIVE: Final = {
    "tokens": "Give rows of text or conversations",
    "preference": "Give rows with chosen and rejected",
    "unpaired": "Give rows with a completion and a label",
    "documents": "Give rows with the columns that the loss names",
}


def check_row_kind(form: str, kind: str, where: str, rows: Sequence[Row]) -> None:
    """Raise `data-format`, with the losses that take such rows, if a format's rows are not of the wanted kind.

    `rows` are the first ones: answers of them that have a label are for a loss that takes a verdict.
    """
    own = FORMATS[form].kind
    if kind in ("any", own):
        return
    if own == "tokens" and any(FORMATS["unpaired"].fits(row.values) for row in rows):
        own = "unpaired"
    said = f"{form} rows" if own == "tokens" else SAID.get(own, f"{form} rows")
    problem = f"these are {said}, but the loss takes {SAID.get(kind, kind)}"
    raise LuthierError("data-format", problem, where=where, remedy=f"{GIVE[kind]}, or {advise_losses(own)}.")
