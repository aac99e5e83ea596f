"""CSV and Parquet files read as rows with their line or row numbers."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from luthier.data.read import row_limit
from luthier.data.read.added_nulls import clean_row
from luthier.data.read.remote_files import RemoteFile
from luthier.data.read.row import Row, broken_row, faulty_row, unreadable_row
from luthier.data.read.textfiles import read_bytes, read_lines
from luthier.errors import LuthierError

MARKS: Final = (";", "\t", "|", ",")  # characters that may separate columns
NAME: Final = re.compile(r"[^\W\d][\w .-]{0,40}")  # what the name of a column looks like


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    """Yield rows under the names in the first line. A row with another number of fields is a `data-row` fault."""
    lines = (line for _, line in read_lines(path))
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    header = _read_header(reader, path, delimiter)
    if header is None:
        return
    _check_delimiter(header, delimiter, path)
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise unreadable_row(f"{path}:1", "two columns have one name", repeated)
    first = reader.line_num + 1
    while (fields := _next_fields(reader, path)) is not None:
        if fields and len(fields) != len(header):
            problem = f"the row has {len(fields)} fields, the header {len(header)}"
            yield faulty_row(broken_row(problem, fields, f"{path}:{first}"))
        elif fields:
            yield Row(dict(zip(header, fields, strict=True)), f"{path}:{first}")
        first = reader.line_num + 1


def _read_header(reader: Any, path: Path, delimiter: str) -> list[str] | None:
    """Return the names of the columns, None for an empty file. Names in quotes may be separated otherwise."""
    try:
        return _next_fields(reader, path)
    except LuthierError:
        _, line = next(read_lines(path))
        _check_delimiter([line.strip()], delimiter, path)
        raise


def _check_delimiter(header: list[str], delimiter: str, path: Path) -> None:
    """Raise `data-unreadable` if the header is one column only because another character separates its names."""
    likely = max((mark for mark in MARKS if mark != delimiter), key="".join(header).count)
    parts = header[0].split(likely) if len(header) == 1 else []
    if len(parts) < 2 or not all(NAME.fullmatch(part.strip().strip('"')) for part in parts):
        return
    problem = f"the header is one column; its names are separated by {likely!r}, but {path.suffix} means {delimiter!r}"
    remedy = "Name the file .tsv." if likely == "\t" else f"Write it again with {delimiter!r} between its columns."
    raise unreadable_row(f"{path}:1", problem, header[0], remedy)


def read_tsv(path: Path) -> Iterator[Row]:
    return read_csv(path, "\t")


def _next_fields(reader: Any, path: Path) -> list[str] | None:
    """Return the next record, None at the end. The process-wide limit on a field's size is restored."""
    before = csv.field_size_limit(row_limit.LIMIT)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise broken_row(f"not CSV: {error}", where=f"{path}:{reader.line_num}") from None
    finally:
        csv.field_size_limit(before)


def _parquet_source(path: Path) -> Any:
    return path.open("rb") if isinstance(path, RemoteFile) else str(path)


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield rows numbered from 1, with one batch in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise LuthierError(
            "dependency-missing", "Parquet needs pyarrow", where=str(path), remedy="Run: pip install pyarrow"
        ) from None
    source = pyarrow.BufferReader(read_bytes(path)) if path.suffix == ".gz" else _parquet_source(path)
    number = 1
    try:
        with pyarrow.parquet.ParquetFile(source, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield Row(clean_row(row), f"{path}:{number}")
                    number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        problem = f"not a complete Parquet file: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise unreadable_row(f"{path}:{number}", problem) from None
