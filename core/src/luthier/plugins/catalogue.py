"""The catalogue of first-party parts: the distribution that brings each part, installed or not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Final

FILE: Final = Path(__file__).with_name("catalogue.json")


def read_catalogue() -> dict[str, dict[str, str]]:
    """Return kind -> name -> distribution; `peft.*` stands for a family of names.

    A test compares the file with the repository.
    """
    return _read_file(FILE)


@functools.cache
def _read_file(path: Path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text("utf-8"))


def distribution_of(kind: str, name: str) -> str | None:
    """Return the distribution that brings a part, or None if no first-party one does."""
    family, dot, _ = name.partition(".")
    parts = read_catalogue().get(kind, {})
    return parts.get(name) or (parts.get(f"{family}.*") if dot else None)
