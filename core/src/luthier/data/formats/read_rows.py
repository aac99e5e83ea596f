"""Rows that were read: each as its format's form, with what no part of the run reads of them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.formats.forms import Form
from luthier.data.formats.known_columns import unread_columns
from luthier.data.formats.recognise_form import FORMATS, convert_row
from luthier.data.formats.wanted import Wanted
from luthier.data.read.row import Row


@attrs.define(kw_only=True)
class ReadRows:
    """The forms of a set, the names of their formats, and the columns that nothing reads."""

    forms: list[Form] = attrs.field(factory=list)
    formats: list[str] = attrs.field(factory=list)
    unread: list[str] = attrs.field(factory=list)

    def add(self, rows: Sequence[Row], form: str, wanted: Wanted) -> None:
        """Take the rows of one source, which are of one format."""
        self.forms += [convert_row(row, form, wanted) for row in rows]
        self.formats.append(form)
        unread = unread_columns(rows, FORMATS[form].reads, wanted)
        self.unread += [name for name in unread if name not in self.unread]

    def chosen(self, numbers: NDArray[np.int64]) -> ReadRows:
        """Return the rows of these numbers alone."""
        return attrs.evolve(self, forms=[self.forms[i] for i in numbers.tolist()])

    @property
    def name(self) -> str:
        """Its formats, each once, in order."""
        return ", ".join(dict.fromkeys(self.formats))
