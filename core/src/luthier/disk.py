"""The disk: files that are whole or absent after a crash, and room kept back for the last words of a run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from luthier.errors import LuthierError

PIECE: Final = 1 << 20  # bytes that are read at once
RESERVED: Final = 1 << 17  # bytes held in reserve, enough to write run.json many times
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """Return the folder for what can be made again: LUTHIER_CACHE, or `luthier` in XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("LUTHIER_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named).expanduser() if named else Path(home) / "luthier"


def digest_file(path: Path) -> str:
    """Return a file's size and CRC-32: against damage, not against malice, at four times the speed of a cryptographic
    hash.
    """
    checksum, size = 0, 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            checksum, size = zlib.crc32(piece, checksum), size + len(piece)
    return f"crc32 {checksum:08x} {size}"


def is_intact(path: Path, known: str) -> bool:
    """Return True if a file has the digest that was taken of it; those of format 1 are 32 digits of BLAKE2b."""
    if known.startswith("crc32 "):
        return digest_file(path) == known
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32] == known


def digest_text(text: str) -> str:
    """32 hexadecimal digits over a text (BLAKE2b)."""
    return hashlib.blake2b(text.encode()).hexdigest()[:32]


def sync_path(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle_folder(folder: Path) -> list[Path]:
    """Force a folder of files to the disk, and let those read them who may read the folder; gives the files.

    safetensors makes files that their owner alone may read.
    """
    inside = sorted(folder.rglob("*"))
    for path in inside:
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)
        sync_path(path)
    sync_path(folder)
    return [path for path in inside if path.is_file()]


def write_json(path: Path, value: Any) -> None:
    """JSON written aside, fsynced, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(value, indent=2), "utf-8")
        sync_path(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def is_full(error: BaseException) -> bool:
    """Return True if a write failed for want of room: a full disk, a quota, or a limit on file size."""
    full = isinstance(error, OSError) and error.errno in FULL
    text = str(error)  # some libraries, such as safetensors, keep only the error's text
    return full or "No space left" in text or any(f"os error {number}" in text for number in FULL)


class Reserve:
    """Room on the disk of `folder` that `release` gives back when the disk is full, so that run.json can still say so.

    It is a file without a name: a killed process leaves nothing of it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - held until it is needed
        try:
            self._file.write(os.urandom(RESERVED))  # random bytes, which a file system can neither omit nor compress
            os.fsync(self._file.fileno())
        except OSError as error:
            self.release()
            if is_full(error):
                raise LuthierError("disk-full", "no room to begin", where=str(folder)) from error
            raise

    def release(self) -> None:
        self._file.close()

    def __enter__(self) -> Reserve:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
