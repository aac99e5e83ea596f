"""Hashes of everything that decides how rows become tokens: tokenizer, source files, rows, and this code itself."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from luthier.data.read.row import Row

LIBRARIES: Final = ("luthier", "tokenizers", "transformers", "jinja2", "sentencepiece", "tiktoken")
WHENCE: Final = ("name_or_path", "is_local", "local_files_only", "_commit_hash")
SIZE: Final = 32  # the number of hexadecimal digits


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's class and of every file that it saves: vocabulary, settings, chat template."""
    state = hashlib.blake2b(f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}\n".encode())
    with tempfile.TemporaryDirectory(prefix="luthier-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                state.update(f"\n{path.relative_to(folder)}\n".encode())
                state.update(_settings(path) if path.name == "tokenizer_config.json" else path.read_bytes())
    return state.hexdigest()[:SIZE]


def _settings(path: Path) -> bytes:
    """Return a tokenizer's settings, except where it was loaded from."""
    settings = json.loads(path.read_text("utf-8"))
    return json.dumps({k: v for k, v in settings.items() if k not in WHENCE}, sort_keys=True).encode()


def file_hash(path: Path) -> str:
    """Return a hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:SIZE]


def rows_hash(rows: Iterable[Row]) -> tuple[str, int]:
    """Return a hash of the rows' values and places, in order, and their size in bytes. TypeError for no plain data."""
    state, size = hashlib.blake2b(), 0
    for row in rows:
        text = json.dumps([row.where, row.values, *([str(row.fault)] if row.fault else ())], default=_plain).encode()
        state.update(text)
        size += len(text)
    return state.hexdigest()[:SIZE], size


def _plain(value: Any) -> Any:
    """Return arrays as lists. Another object might look equal and differ, so it raises TypeError and has no hash."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)


@functools.cache
def code_hash() -> str:
    """Return a hash of the source of `luthier.data` and of the versions of the libraries that render and tokenise."""
    state = hashlib.blake2b()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        state.update(path.name.encode() + path.read_bytes())
    for name in LIBRARIES:
        state.update(f"{name} {_version(name)}\n".encode())
    return state.hexdigest()[:SIZE]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"
