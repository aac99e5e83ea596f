"""A row of data, and the errors that name its place."""

from __future__ import annotations

from typing import Any

import attrs

from luthier.errors import LuthierError


@attrs.frozen
class Row:
    """One row as it was read, after its columns were mapped."""

    values: dict[str, Any]
    where: str  # file:line, or the place in the object that was given
    mapped: frozenset[str] = frozenset()  # our columns that the recipe names for it
    used: frozenset[str] = frozenset()  # the data's columns that these were made of
    ignored: frozenset[str] = frozenset()  # columns that the recipe ignores and that the row had
    fault: LuthierError | None = None  # the reason why it could not be read

    @property
    def whole(self) -> Row:
        """Return the row, or raise what is wrong with it."""
        if self.fault is not None:
            raise self.fault
        return self


def unreadable_row(where: str, problem: str, value: object = None, remedy: str | None = None) -> LuthierError:
    return LuthierError("data-unreadable", problem, where=where, found=value, remedy=remedy)


def broken_row(problem: str, value: object = None, where: str | None = None, remedy: str | None = None) -> LuthierError:
    return LuthierError("data-row", problem, where=where, found=value, remedy=remedy)


def faulty_row(error: LuthierError) -> Row:
    """Return a row that could not be read, so that reading goes on after it."""
    return Row({}, error.where or "", fault=error)


def row_of(value: object, where: str) -> Row:
    """Return a row, which is faulty unless the value is an object with named columns."""
    if not isinstance(value, dict):
        return faulty_row(broken_row("a row must be an object with named columns", value, where))
    return Row(value, where)
