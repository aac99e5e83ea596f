"""Rows that were read: each in its format's form, with the columns that nothing in the run reads."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.formats.bad_rows import EMPTY, Fault
from luthier.data.formats.forms import Form
from luthier.data.formats.known_columns import unread_columns
from luthier.data.formats.recognise_form import FORMATS, convert_row, is_empty
from luthier.data.formats.wanted import Wanted
from luthier.data.read.columns import ignored_columns
from luthier.data.read.packed_rows import PackedRows
from luthier.data.read.row import Row
from luthier.data.source_shares import SourceRows
from luthier.errors import LuthierError, suggest_nearest
from luthier.recipe.schema import Source


@attrs.define(kw_only=True)
class ReadRows:
    """The forms of a set, the names of their formats, and the columns that nothing reads."""

    forms: PackedRows[Form] = attrs.field(factory=PackedRows)
    numbers: list[int] = attrs.field(factory=list)  # the row's number of each form
    count: int = 0  # the number of all rows
    faults: list[Fault] = attrs.field(factory=list)  # of the rows that could not be converted
    formats: list[str] = attrs.field(factory=list)
    unread: list[str] = attrs.field(factory=list)
    # columns that the recipe ignores but that no row has, with the nearest names
    absent: list[str] = attrs.field(factory=list)
    parts: list[SourceRows] = attrs.field(factory=list)  # the row numbers of each source

    def add(self, rows: Sequence[Row], form: str, wanted: Wanted, source: Source | None = None) -> None:
        """Add the rows of one source, which have one format."""
        if source is not None:
            self.parts.append(SourceRows(source=source, first=self.count, end=self.count + len(rows)))
        for row in rows:
            try:
                self.forms.append(convert_row(row, form, wanted))
                self.numbers.append(self.count)
            except LuthierError as error:
                kind = EMPTY if row.fault is None and is_empty(row) else ""
                self.faults.append(Fault.of(error, kind, self.count))
            self.count += 1
        self.formats.append(form)
        self.absent += [] if source is None else _absent_columns(source, rows)
        unread = unread_columns(rows, FORMATS[form].reads, wanted)
        self.unread += [name for name in unread if name not in self.unread]

    def chosen(self, places: NDArray[np.int64], *, faults: bool) -> ReadRows:
        """Return only the forms at these places, with the bad rows or without."""
        forms, numbers = PackedRows(self.forms[i] for i in places.tolist()), [self.numbers[i] for i in places.tolist()]
        chosen_faults = self.faults if faults else []
        return attrs.evolve(
            self, forms=forms, numbers=numbers, faults=chosen_faults, count=len(forms) + len(chosen_faults)
        )

    @property
    def name(self) -> str:
        """Return the set's formats, each once, in order."""
        return ", ".join(dict.fromkeys(self.formats))


def _absent_columns(source: Source, rows: Sequence[Row]) -> list[str]:
    """Return the columns that a source ignores but that none of its rows has, each with the nearest existing name."""
    absent = ignored_columns(source).difference(*(row.ignored for row in rows))
    if not absent:
        return []
    present = sorted({name for row in rows for name in row.values})
    return [f"{name!r} ({suggest_nearest(name, present)})" for name in sorted(absent)]
