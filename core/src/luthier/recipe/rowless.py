"""Recipes without rows, for users who plan before they have any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from luthier.errors import LuthierError

NO_ROWS: Final = "python:none"  # the data of a recipe without rows
Found = TypeVar("Found")


def with_or_without_rows(read: Callable[[dict[str, str]], Found]) -> Found:
    """Return what `read` returns; if only data was missing, call it again with `NO_ROWS` as data."""
    try:
        return read({})
    except LuthierError as error:
        if error.code != "recipe-missing" or not (error.where or "").endswith("data"):
            raise
        return read({"data": NO_ROWS})
