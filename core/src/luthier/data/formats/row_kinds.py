"""The kinds of rows that losses take: whether a format's rows are of the wanted kind, and which losses take them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

from luthier.data.formats.recognise_form import FORMATS, SAMPLE, recognise_format
from luthier.data.formats.wanted import Wanted, advise_losses
from luthier.data.read.columns import mapped_columns
from luthier.data.read.row import Row
from luthier.data.read.sources import find_files, read_source
from luthier.errors import LuthierError
from luthier.recipe.schema import Data

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


def check_first_rows(data: Data, wanted: Wanted) -> None:
    """Raise `data-format` if the first rows of a source in files show that the loss does not take its kind.

    Sources of which no row can be read, and those of the hub, are left to those who read them whole.
    """
    sources = [*data.train, *(data.validation if isinstance(data.validation, list) else ())]
    for source in sources if wanted.kind != "documents" else ():
        rows = list(islice(read_source(source, data.text_unit), SAMPLE)) if find_files(source.path) else []
        form: str = data.format
        if form == "auto" and any(row.fault is None for row in rows):
            form = recognise_format(rows, source.path, mapped_columns(source), wanted.kind)
        if form != "auto":
            check_row_kind(form, wanted.kind, source.path, rows)
