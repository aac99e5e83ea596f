"""The catalogue of first-party parts: which distribution brings which name, installed or not."""

from __future__ import annotations

import functools
import json
from importlib import resources


@functools.cache
def catalogue() -> dict[str, dict[str, str]]:
    """kind -> name -> distribution. A test holds the file to the repository."""
    return json.loads(resources.files("luthier.plugins").joinpath("catalogue.json").read_text("utf-8"))


def distribution(kind: str, name: str) -> str | None:
    """The distribution that brings a part, or None where no first-party one does."""
    return catalogue().get(kind, {}).get(name)
