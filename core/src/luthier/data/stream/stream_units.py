"""Units: what a stream reads one after another, each a file, a hub dataset or an object, from any row on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.data.read.columns import column_mapper
from luthier.data.read.content_hash import SIZE
from luthier.data.read.hub import read_hub
from luthier.data.read.python_rows import gives_once, read_object
from luthier.data.read.remote_files import RemoteFile
from luthier.data.read.row import Row
from luthier.data.read.row_limit import limit_row
from luthier.data.read.sources import find_files, read_rows
from luthier.errors import LuthierError
from luthier.recipe.schema import Source

ENDS: Final = 1 << 16  # bytes at both ends of a file that identify it


@attrs.frozen(kw_only=True, eq=False)
class Unit:
    """Rows that are read in their order. `mark` identifies them without reading all of them."""

    source: Source
    raw: Callable[[], Iterator[Row]]
    mark: Any = None

    def rows(self, skip: int = 0) -> Iterator[Row]:
        """Yield the rows from the `skip`-th on, with their columns mapped."""
        return map(column_mapper(self.source), map(limit_row, islice(self.raw(), skip, self.source.max_rows)))


def source_units(source: Source, given: Any, text_unit: str) -> list[Unit]:
    """Return the units of one source: one for each file, unless `max_rows` counts over all of them.

    Raises `data-format` for an iterator, which gives its rows only once.
    """
    if given is not None:
        if gives_once(given):
            problem, remedy = "an iterator gives its rows only once", "Give a list, a dataset, or an IterableDataset."
            raise LuthierError("data-format", problem, where=source.path, found=type(given).__name__, remedy=remedy)
        return [Unit(source=source, raw=lambda: read_object(given, source.path), mark=type(given).__name__)]
    files = find_files(source.path)
    if not files:
        return [Unit(source=source, raw=lambda: read_hub(source, streaming=True), mark=attrs.asdict(source))]
    if source.max_rows is not None:
        whole = _reader(files, text_unit)
        return [Unit(source=source, raw=whole, mark=[_mark(path) for path in files])]
    return [Unit(source=source, raw=_reader([path], text_unit), mark=_mark(path)) for path in files]


def fingerprint_units(units: Sequence[Unit], first: Sequence[Sequence[Row]], **others: Any) -> str:
    """Return a hash that identifies these units and the options of their making. No file is read to its end."""
    rows = [[row.values for row in sample] for sample in first]
    text = json.dumps([[unit.mark for unit in units], rows, others], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode()).hexdigest()[: SIZE // 2]


def _reader(files: Sequence[Path], text_unit: str) -> Callable[[], Iterator[Row]]:
    return lambda: chain.from_iterable(read_rows(path, text_unit) for path in files)


def _mark(path: Path) -> list[Any]:
    """Return a file's name and size, and a hash of both its ends."""
    if isinstance(path, RemoteFile):
        return list(path.mark)
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(ENDS)
        file.seek(max(size - ENDS, 0))
        ends += file.read(ENDS)
    return [path.name, size, hashlib.blake2b(ends).hexdigest()[:SIZE]]
