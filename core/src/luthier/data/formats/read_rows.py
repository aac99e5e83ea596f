"""Rows that were read: each in its format's form, with the columns that nothing in the run reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.formats.bad_rows import EMPTY, Fault
from luthier.data.formats.forms import Conversation, Form, Instruction
from luthier.data.formats.known_columns import UnreadColumns
from luthier.data.formats.recognise_form import FORMATS, convert_row, is_empty
from luthier.data.formats.wanted import Wanted
from luthier.data.read.columns import ignored_columns
from luthier.data.read.packed_rows import PackedRows
from luthier.data.read.row import Row
from luthier.data.source_shares import SourceRows
from luthier.errors import LuthierError, suggest_nearest
from luthier.recipe.schema import Source


@attrs.define
class Talks:
    """The conversations of a set: how many there are, how many lack a system prompt, and what they set."""

    count: int = 0
    bare: int = 0
    settings: set[str] = attrs.field(factory=set)  # names of variables for the chat template

    def note(self, form: Form) -> None:
        """Add a form, if it is a conversation."""
        if isinstance(form, Conversation):
            has_system = form.messages[0]["role"] == "system"
        elif isinstance(form, Instruction):
            has_system = bool(form.system)
        else:
            return
        self.count += 1
        self.bare += not has_system
        self.settings.update(form.settings)

    def merge(self, others: Talks) -> None:
        """Add the conversations of another set."""
        self.count += others.count
        self.bare += others.bare
        self.settings |= others.settings

    @classmethod
    def of(cls, forms: Iterable[Form]) -> Talks:
        talks = cls()
        for form in forms:
            talks.note(form)
        return talks


@attrs.define(kw_only=True)
class ReadRows:
    """The forms of a set, the names of their formats, and the columns that nothing reads."""

    forms: PackedRows[Form] | list[Form] = attrs.field(factory=PackedRows[Form])
    talks: Talks = attrs.field(factory=Talks)
    numbers: list[int] = attrs.field(factory=list)  # the row's number of each form
    count: int = 0  # the number of all rows
    faults: list[Fault] = attrs.field(factory=list)  # of the rows that could not be converted
    formats: list[str] = attrs.field(factory=list)
    unread: list[str] = attrs.field(factory=list)
    # columns that the recipe ignores but that no row has, with the nearest names
    absent: list[str] = attrs.field(factory=list)
    parts: list[SourceRows] = attrs.field(factory=list)  # the row numbers of each source

    def add(self, rows: Iterable[Row], form: str, wanted: Wanted, source: Source | None = None) -> None:
        """Add the rows of one source, which have one format. They are read once, one after the other."""
        first, reading = self.count, RowReading(self, form, wanted, source)
        for row in rows:
            reading.add(row)
        self.end_source(form, reading.unread.found, first, source)
        self.absent += reading.ignored.absent()

    def end_source(self, form: str, unread: Collection[str], first: int, source: Source | None) -> None:
        """Note what is known of a source once all of its rows were added. `first` is the number of its first row."""
        if source is not None:
            self.parts.append(SourceRows(source=source, first=first, end=self.count))
        self.formats.append(form)
        self.unread += [name for name in sorted(unread) if name not in self.unread]

    def take(self, form: Form) -> None:
        """Add the form of a row."""
        self.forms.append(form)
        self.talks.note(form)
        self.numbers.append(self.count)
        self.count += 1

    def merge(self, part: ReadRows) -> None:
        """Add the rows of a part of a source, without their forms."""
        self.numbers += [self.count + number for number in part.numbers]
        self.faults += [attrs.evolve(fault, number=self.count + fault.number) for fault in part.faults]
        self.talks.merge(part.talks)
        self.count += part.count

    def chosen(self, places: NDArray[np.int64], *, faults: bool) -> ReadRows:
        """Return only the forms at these places, with the bad rows or without."""
        forms, numbers = PackedRows(self.forms[i] for i in places.tolist()), [self.numbers[i] for i in places.tolist()]
        chosen_faults = self.faults if faults else []
        return attrs.evolve(
            self, forms=forms, talks=Talks.of(forms), numbers=numbers, faults=chosen_faults,
            count=len(forms) + len(chosen_faults),
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Return the set's formats, each once, in order."""
        return ", ".join(dict.fromkeys(self.formats))


class RowReading:
    """The reading of one source's rows into a set, with the columns that nothing reads."""

    def __init__(self, read: ReadRows, form: str, wanted: Wanted, source: Source | None) -> None:
        self.read, self.form, self.wanted = read, form, wanted
        self.unread = UnreadColumns(FORMATS[form].reads, wanted)
        self.ignored = IgnoredColumns.of(source)

    def add(self, row: Row) -> None:
        """Add a row, or note what is wrong with it."""
        try:
            self.read.take(convert_row(row, self.form, self.wanted))
        except LuthierError as error:
            kind = EMPTY if row.fault is None and is_empty(row) else ""
            self.read.faults.append(Fault.of(error, kind, self.read.count))
            self.read.count += 1
        self.unread.note(row)
        self.ignored.note(row)


@attrs.define
class IgnoredColumns:
    """The columns that a source ignores, and which of them its rows have."""

    lacking: set[str]  # that no row has had so far
    present: set[str] = attrs.field(factory=set)  # every column of the rows, if one is lacking

    @classmethod
    def of(cls, source: Source | None) -> IgnoredColumns:
        return cls(set() if source is None else set(ignored_columns(source)))

    def note(self, row: Row) -> None:
        if self.lacking:
            self.lacking -= row.ignored
            self.present.update(row.values)

    def absent(self) -> list[str]:
        """Return the ignored columns that no row has, each with the nearest name of a column that there is."""
        return [f"{name!r} ({suggest_nearest(name, sorted(self.present))})" for name in sorted(self.lacking)]
