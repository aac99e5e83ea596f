"""The reading of a recipe's files, hub datasets and Python objects as rows with their places, without torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, cast

from luthier.data.read.columns import column_mapper
from luthier.data.read.hub import HUB_NAME, read_hub
from luthier.data.read.jsonfiles import read_json, read_jsonl
from luthier.data.read.python_rows import read_object
from luthier.data.read.remote_files import find_remote, is_address
from luthier.data.read.row import Row, unreadable_row
from luthier.data.read.row_limit import limit_row
from luthier.data.read.table_files import read_csv, read_parquet, read_tsv
from luthier.data.read.textfiles import read_text
from luthier.errors import LuthierError, suggest_nearest
from luthier.recipe.schema import Data, Source

READERS: Final[dict[str, Callable[[Path], Iterator[Row]]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
TEXT: Final = (".txt", ".text", ".md")


def read_source(source: Source, text_unit: str = "paragraph") -> Iterator[Row]:
    """Yield the rows of a source in order, with its columns mapped, at most `max_rows` of them."""
    return _limited(_rows(source, text_unit), source)


def read_given(rows: Any, name: str = "rows", source: Source | None = None) -> Iterator[Row]:
    """Yield the rows of a Python object, with the columns, template and `max_rows` of `source` if it is given."""
    return _limited(read_object(rows, name), source or Source(path=name))


def _limited(rows: Iterable[Row], source: Source) -> Iterator[Row]:
    return map(column_mapper(source), map(limit_row, islice(rows, source.max_rows)))


def _rows(source: Source, text_unit: str) -> Iterator[Row]:
    files = find_files(source.path)
    if not files:
        yield from read_hub(source)
    for path in files:
        yield from read_rows(path, text_unit)


def read_rows(path: Path, text_unit: str = "paragraph") -> Iterator[Row]:
    """Yield the rows of one file. Raises `data-empty` if it holds none."""
    suffix = file_kind(path)
    if path.is_dir() or suffix not in (*READERS, *TEXT):
        known = ", ".join((*READERS, *TEXT))
        problem = "this is a folder" if path.is_dir() else f"no reader for files named *{suffix or path.name}"
        raise unreadable_row(
            str(path), problem, remedy=f"Name files, or a glob such as folder/*.jsonl, of: {known} [.gz]."
        )
    rows = READERS[suffix](path) if suffix in READERS else read_text(path, text_unit)
    first = next(rows, None)
    if first is None:
        raise LuthierError("data-empty", "the file holds no rows", where=str(path))
    yield first
    yield from rows


def local_sources(data: Data) -> list[Source]:
    """Return the sources for training and validation that are neither addresses nor rows from Python, nor a hub's.

    Raises `data-not-found` for a file that does not exist.
    """
    sources = [*data.train, *(data.validation if isinstance(data.validation, list) else ())]
    # s3://... and python:rows have a colon in their first part
    return [source for source in sources if ":" not in source.path.split("/")[0] and find_files(source.path)]


def file_kind(path: Path) -> str:
    """Return the suffix that names the format, without .gz: `.jsonl` for `a.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def find_files(pattern: str) -> list[Path]:
    """Return the files of a path, glob or address, sorted; an empty list if the text can only be a hub dataset's name.

    `$NAME` and `~` are expanded. Raises `data-not-found`, without touching the network, if it cannot be a hub name.
    """
    if is_address(pattern):
        return cast(list[Path], find_remote(pattern))  # readers open, name and print them as they do paths
    expanded = os.path.expanduser(os.path.expandvars(pattern.removeprefix("file://")))
    path = Path(expanded)
    if os.path.exists(path):
        return [path]
    paths = sorted(Path(name) for name in glob.glob(expanded, recursive=True))
    if paths:
        return paths
    named = path.suffix == ".gz" or file_kind(path) in (*READERS, *TEXT)
    if named or glob.has_magic(expanded) or not HUB_NAME.fullmatch(expanded):
        raise _not_found(pattern, path)
    return []


def _not_found(pattern: str, path: Path) -> LuthierError:
    if "$" in str(path):
        remedy: str | None = "Set the environment variable that the path names."
    elif glob.has_magic(str(path)):
        remedy = None
    else:
        near = suggest_nearest(path.name, (p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""
        remedy = near if near.startswith("Did") else None
    return LuthierError("data-not-found", "no such file", where=pattern, remedy=remedy)
