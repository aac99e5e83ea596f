"""Sets of files of JSON Lines: the processes that make examples read the rows themselves, a block of lines at a time.

The rows are then neither kept nor handed from one process to another. Everything else is as for rows that are read
first: if anything but a bad row goes wrong, or the files are of another kind, the caller reads the rows in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from luthier.data.formats.read_rows import ReadRows
from luthier.data.formats.recognise_form import FORMATS, first_rows
from luthier.data.formats.wanted import Wanted
from luthier.data.line_rows import LineRows
from luthier.data.read.columns import ignored_columns
from luthier.data.read.line_blocks import SUFFIXES, LineFile, LinesRefused
from luthier.data.read.sources import file_kind, find_files
from luthier.data.stream.row_stream import FormOf
from luthier.data.stream.source_rows import Supply
from luthier.data.tokenise.examples_of_rows import Made
from luthier.errors import LuthierError
from luthier.recipe.schema import Data, Source


@attrs.frozen(kw_only=True)
class SourceLines:
    """The files of one source, and how their rows are read."""

    source: Source
    form: str
    wanted: Wanted
    files: Sequence[LineFile]

    def parts(self) -> Iterator[LineRows]:
        """Yield the rows in parts, in order."""
        for file in self.files:
            for block in file.loaded():
                yield LineRows(block=block, form=self.form, wanted=self.wanted, source=self.source)

    @property
    def num_lines(self) -> int:
        return sum(block.count for file in self.files for block in file.blocks)


def find_lines(data: Data, supplies: Sequence[Supply], wanted: Wanted, form_of: FormOf) -> list[SourceLines] | None:
    """Return the lines of every source; None if one of them is not made of files of JSON Lines, or cannot be read."""
    found = []
    try:
        for supply in supplies:
            files = _own_files(supply)
            if not files:
                return None
            first = first_rows(supply.read_once())
            form = form_of(data, first, supply.source, wanted)
            if wanted.kind == "any":
                wanted = attrs.evolve(wanted, kind=FORMATS[form].kind)
            cut = [LineFile.of(path) for path in files]
            found.append(SourceLines(source=supply.source, form=form, wanted=wanted, files=cut))
    except (LinesRefused, LuthierError):
        return None
    return found


def _own_files(supply: Supply) -> list[Path]:
    """Return the files of a source if all of them are files of JSON Lines, of which every row is read."""
    source = supply.source
    if supply.held is not None or source.max_rows is not None or ignored_columns(source):
        return []
    files = find_files(source.path)
    fits = all(isinstance(path, Path) and path.is_file() and file_kind(path) in SUFFIXES for path in files)
    return files if fits else []


def add_read(lines: Sequence[SourceLines], made: Iterator[Made], read: ReadRows) -> Iterator[Made]:
    """Yield what was made of each part of the lines, after what was read of it was added to `read`.

    Raises LinesRefused for lines that have to be read in order.
    """
    for source in lines:
        first, unread = read.count, set[str]()
        for file in source.files:
            before = read.count
            for part in itertools.islice(made, len(file.blocks)):
                if part.read is None:
                    raise LinesRefused
                read.merge(part.read)
                unread.update(part.read.unread)
                yield part
            if read.count == before or not file.is_same:
                raise LinesRefused
        read.end_source(source.form, unread, first, source.source)
