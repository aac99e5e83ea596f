"""Rows of the Hugging Face hub's datasets and of `datasets` objects."""

from __future__ import annotations

import functools
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from luthier.data.read.python_rows import read_object
from luthier.data.read.row import Row
from luthier.errors import LuthierError
from luthier.recipe.schema import Source

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def read_hub(source: Source, *, streaming: bool = False) -> Iterator[Row]:
    """Yield the rows of a hub dataset's split; with `streaming`, as they are requested. No code from the hub is run."""
    try:
        import datasets
    except ImportError:
        problem, remedy = "a hub dataset needs the library datasets", "Run: pip install datasets"
        raise LuthierError("dependency-missing", problem, where=source.path, remedy=remedy) from None
    if not _held(source.path, datasets.config.HF_DATASETS_CACHE) and (problem := explain_unreachable()):
        problem = f"there is no such file, and {problem}"
        raise LuthierError("data-not-found", problem, where=source.path, remedy="Check the path, or the network.")
    try:
        made = datasets.load_dataset(source.path, name=source.name, split=source.split, revision=source.revision,
                                     streaming=streaming)  # fmt: skip
    except Exception as error:  # the hub client's errors (network, name, split, access) have no common class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LuthierError(
            "data-not-found",
            f"there is no such file, and the hub gives no such dataset: {reason[0]}",
            where=source.path,
            remedy="Check the path, or the dataset's name, config name and split.",
        ) from None
    return read_object(made, f"{source.path}/{source.split}")


def _held(name: str, cache: str | Path) -> bool:
    """Return True if the client has stored anything of the dataset."""
    folder = name.replace("/", "___")
    return any((Path(cache) / spelled).exists() for spelled in (folder, folder.lower()))


@functools.cache
def explain_unreachable() -> str:
    """Return why the hub cannot be reached; an empty text if it can.

    It tries once, as the client would try for a minute.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    place = urlsplit(endpoint)
    if os.environ.get("HF_HUB_OFFLINE") or urllib.request.getproxies().keys() & {place.scheme, "all"}:
        return ""  # the hub's own client decides in this case
    try:
        socket.create_connection((place.hostname, place.port or (80 if place.scheme == "http" else 443)), 10).close()
    except OSError as error:
        return f"the hub at {endpoint} cannot be reached: {error.strerror or error}"
    return ""
