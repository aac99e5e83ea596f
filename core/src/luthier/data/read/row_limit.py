"""The largest size of a row, the same for every container: something larger is a file that was read as one row."""

from __future__ import annotations

from typing import Any, Final

import attrs

from luthier.data.read.row import Row, broken_row
from luthier.errors import LuthierError

LIMIT = 1 << 28  # characters, where a number counts as 8
PLAIN: Final = frozenset((int, float, bool, type(None)))


def oversized_row(size: int, where: str) -> LuthierError:
    """Return the error for a row of so many characters."""
    problem = f"the row is larger than {LIMIT:,} characters, the most that a row may have"
    remedy = "Cut it into several rows."
    return LuthierError("data-row", problem, where=where, found=f"{size:,} or more", remedy=remedy)


def limit_row(row: Row) -> Row:
    """Return the row, or a faulty one if it is larger than a row may be, or nested too deeply to measure."""
    try:
        size = sum(map(row_size, row.values.values()))
    except RecursionError:
        return attrs.evolve(row, values={}, fault=broken_row("the row is nested too deeply", where=row.where))
    return row if size <= LIMIT else attrs.evolve(row, values={}, fault=oversized_row(size, row.where))


def row_size(value: Any) -> int:
    """Return the characters of a value's texts, plus 8 for each number."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(row_size, value.values())) + sum(map(len, map(str, value)))
    if isinstance(value, (list, tuple)):
        return 8 * len(value) if PLAIN.issuperset(map(type, value)) else sum(map(row_size, value))
    return 8
