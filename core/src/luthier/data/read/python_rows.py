"""Rows from Python: lists, iterables, frames and tables of any library, with their values as plain Python's."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from luthier.data.read.added_nulls import make_cleaner
from luthier.data.read.row import Row, broken_row, faulty_row, row_of, unreadable_row

PLAIN: Final = frozenset((str, int, float, bool, type(None)))
EXACT: Final = 2**53  # whole numbers below this are exact in float64
PART: Final = 1024  # rows of a table that become Python objects at a time
REMEDY: Final = (
    "Give a list of dicts, a Dataset or an IterableDataset, a DataFrame or an Arrow table; "
    "of a DatasetDict choose a split."
)


def read_object(rows: Any, name: str) -> Iterator[Row]:
    """Yield rows from Python, each with the place `name[i]`. Nulls that their container added are removed."""
    clean = make_cleaner(rows)
    for i, row in enumerate(_records(rows, name)):
        yield _plain_row(clean(row) if isinstance(row, dict) else row, f"{name}[{i}]")


def _plain_row(row: Any, where: str) -> Row:
    try:
        return row_of(plain_value(row), where)
    except RecursionError:
        return faulty_row(broken_row("the row is nested too deeply, or holds itself", where=where))


def plain_value(value: Any) -> Any:
    """Return the value as Python's own: arrays, tuples and tensors as lists, numbers of other libraries as numbers."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque, range)):
        items = list(value)
        return items if PLAIN.issuperset(map(type, items)) else [plain_value(item) for item in items]
    # numpy, torch and pandas have the first, pyarrow the second
    own = getattr(value, "tolist", None) or getattr(value, "as_py", None)
    return plain_value(own()) if callable(own) and not isinstance(value, type) else value


def gives_once(rows: Any) -> bool:
    """Return True if rows can be read only once, like those of a generator."""
    return isinstance(rows, Iterator)


def _records(rows: Any, name: str) -> Iterator[Any]:
    module = type(rows).__module__.partition(".")[0]
    if module == "pandas" and hasattr(rows, "iloc") and hasattr(rows, "columns"):
        return _frame_records(rows, name)
    if module == "polars" and hasattr(rows, "iter_rows"):
        return iter(rows.iter_rows(named=True))
    if module == "pyarrow":
        return _table_records(rows, name)
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        problem = "rows must be a list of dicts, or one split of a dataset"
        raise unreadable_row(name, problem, type(rows).__name__, remedy=REMEDY)
    return iter(rows)


def _frame_records(frame: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data frame. A missing cell becomes null."""
    import pandas

    names = list(frame.columns)
    if not all(isinstance(column, str) for column in names) or len(set(names)) != len(names):
        raise unreadable_row(name, "each column of a data frame must have a name of its own", names)
    whole = [column for column in names if _is_whole(frame[column])]
    for start in range(0, len(frame), PART):
        for record in frame.iloc[start : start + PART].to_dict("records"):
            row: dict[str, Any] = {key: None if _is_missing(pandas, value) else value for key, value in record.items()}
            yield {**row, **{key: int(row[key]) for key in whole if row[key] is not None}}


def _is_whole(column: Any) -> bool:
    """Return True if a column of floats holds whole numbers, which pandas makes floats if one is missing."""
    if getattr(column.dtype, "kind", "") != "f" or not column.isna().any():
        return False
    known = column.dropna()
    return len(known) > 0 and bool((known.abs() < EXACT).all()) and bool((known % 1 == 0).all())


def _is_missing(pandas: Any, value: Any) -> bool:
    return bool(pandas.api.types.is_scalar(value)) and bool(pandas.isna(value))


def _table_records(table: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow table, of one of its batches, or of a reader of batches."""
    if not hasattr(table, "schema"):
        raise unreadable_row(name, "this is an Arrow column, not a table of rows", type(table).__name__, remedy=REMEDY)
    batches = table.to_batches(max_chunksize=PART) if hasattr(table, "to_batches") else table
    for batch in [batches] if hasattr(batches, "to_pylist") else batches:
        for start in range(0, batch.num_rows, PART):
            yield from batch.slice(start, PART).to_pylist()
