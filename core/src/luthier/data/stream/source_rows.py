"""Supplies: the sources of a set, each with a hash of its content, read only once and only when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from luthier.data.read.content_hash import file_hash, rows_hash
from luthier.data.read.packed_rows import PackedRows
from luthier.data.read.row import Row
from luthier.data.read.sources import find_files, read_given, read_source
from luthier.errors import LuthierError
from luthier.recipe.schema import Source


@attrs.define(kw_only=True)
class Supply:
    """One source. `content` is a hash of its rows, None if they cannot be hashed; `size` is in bytes."""

    source: Source
    text_unit: str
    size: int = 0
    content: Any = None
    held: Sequence[Row] | None = None

    @property
    def rows(self) -> Sequence[Row]:
        """Return the source's rows. Raises `data-empty` if there is none."""
        if self.held is None:
            self.held = PackedRows(read_source(self.source, self.text_unit))
        if not self.held:
            raise LuthierError("data-empty", "there are no rows", where=self.source.path)
        return self.held

    def read_once(self) -> Iterator[Row]:
        """Yield the source's rows, which are not kept if they come from files. Raises `data-empty` if there is none."""
        rows = iter(read_source(self.source, self.text_unit) if self.held is None else self.held)
        first = next(rows, None)
        if first is None:
            raise LuthierError("data-empty", "there are no rows", where=self.source.path)
        yield first
        yield from rows

    @property
    def identity(self) -> Any:
        """Return everything that decides the source's rows, as plain data."""
        return {"source": attrs.asdict(self.source), "content": self.content}

    def forget(self) -> None:
        """Release the rows, once they have been read."""
        self.held = None


def make_supplies(sources: Sequence[Source], given: Any, name: str, text_unit: str, *, telling: bool) -> list[Supply]:
    """Return the sources, or the rows that are given instead. With `telling`, also determine their content."""
    if given is not None:
        source = attrs.evolve(sources[0] if len(sources) == 1 else Source(path=name), path=name)
        rows = list(read_given(given, name, source))
        return [_of_rows(source, rows, text_unit, telling=telling)]
    if not sources:
        raise LuthierError("data-empty", "no source of rows is given", where="data.train")
    supplies = []
    for source in sources:
        files = find_files(source.path)
        if not telling:
            supplies.append(Supply(source=source, text_unit=text_unit))
        elif files and all(isinstance(path, Path) and path.is_file() for path in files):
            content = [[str(path), file_hash(path)] for path in files]
            size = sum(path.stat().st_size for path in files)
            supplies.append(Supply(source=source, text_unit=text_unit, content=content, size=size))
        else:
            supplies.append(_of_rows(source, PackedRows(read_source(source, text_unit)), text_unit, telling=True))
    return supplies


def _of_rows(source: Source, rows: Sequence[Row], text_unit: str, *, telling: bool) -> Supply:
    """Return a supply of rows that were read already: a hub dataset's, or those from Python."""
    supply = Supply(source=source, text_unit=text_unit, held=rows)
    if telling:
        try:
            supply.content, supply.size = rows_hash(rows)
        except TypeError:  # objects that are neither JSON nor arrays
            return supply
    return supply
