"""Rows that are passed as Python objects. They are written to a job's folder before the job is written down."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.data.read.sources import read_given
from luthier.errors import LuthierError
from luthier.recipe.reading.shorthand import OF_A_SOURCE


def is_named(data: Any) -> bool:
    """Return True if a recipe can hold the value: a path, a share, a mapping of settings, or sources."""
    if isinstance(data, (str, Path, float)):
        return True
    if isinstance(data, Mapping):
        return not hasattr(data, "column_names")  # a DatasetDict has this attribute, and is rows
    return isinstance(data, Sequence) and bool(data) and all(isinstance(d, str) or _is_source(d) for d in data)


def write_given(rows: Any, room: Path, role: str) -> Path:
    """Write rows as JSON lines into a job's folder, in a file named by their hash, and return its path."""
    digest, partial = hashlib.sha256(), room / f".{role}.partial"
    with partial.open("wb") as file:
        for row in (row.whole for row in read_given(rows, role)):
            try:
                line = json.dumps(row.values, ensure_ascii=False, default=_as_plain).encode() + b"\n"
            except (TypeError, ValueError) as error:
                raise LuthierError("data-row", f"cannot be written as JSON: {error}", where=row.where) from None
            digest.update(line)
            file.write(line)
    path = room / f"given-{role}-{digest.hexdigest()[:16]}.jsonl"
    os.replace(partial, path)
    return path


def _is_source(value: Any) -> bool:
    return isinstance(value, Mapping) and "path" in value and set(value) <= {*OF_A_SOURCE}


def _as_plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no JSON value")
