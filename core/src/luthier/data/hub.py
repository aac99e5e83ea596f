"""Rows of the Hugging Face hub's datasets and of `datasets` objects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from luthier.data.rows import Row, row_of, unreadable
from luthier.errors import LuthierError
from luthier.recipe.tree import Source

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def read_hub(source: Source) -> Iterator[Row]:
    """The rows of a hub dataset's split. No code from the hub is run."""
    try:
        import datasets
    except ImportError:
        problem, remedy = "a hub dataset needs the library datasets", "Run: pip install datasets"
        raise LuthierError("dependency-missing", problem, where=source.path, remedy=remedy) from None
    try:
        made = datasets.load_dataset(source.path, name=source.name, split=source.split, revision=source.revision)
    except Exception as error:  # the hub client's errors have no common class: network, name, split, access
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LuthierError(
            "data-not-found",
            f"there is no such file, and the hub gives no such dataset: {reason[0]}",
            where=source.path,
            remedy="Check the path, or the dataset's name, config name and split.",
        ) from None
    return read_object(made, f"{source.path}/{source.split}")


def read_object(rows: Iterable[Any], name: str) -> Iterator[Row]:
    """Rows in Python: a list of dicts, a Dataset or an IterableDataset; the place is `name[i]`."""
    if isinstance(rows, (str, bytes, dict)) or not isinstance(rows, Iterable):
        raise unreadable(
            name,
            "rows must be a list of dicts, or one split of a dataset",
            type(rows).__name__,
            remedy="Give a list of dicts, a Dataset or an IterableDataset; of a DatasetDict choose a split.",
        )
    yield from (row_of(row, f"{name}[{i}]") for i, row in enumerate(rows))
