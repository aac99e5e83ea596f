"""Archives from a service, unpacked so that nothing is written outside the folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final

from luthier.errors import LuthierError

MOST: Final = 2**41  # bytes of all members; larger archives are refused
ZSTD: Final = b"\x28\xb5\x2f\xfd"


def unpack_archive(archive: Path, folder: Path, most: int = MOST) -> list[Path]:
    """Unpack a tar, plain or packed with gzip or zstd, into `folder`, and return its files.

    Raises `archive-unsafe` for a member that leads out of the folder, a link, a device, or more than `most` bytes, and
    `archive-damaged`. Then nothing of the archive stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as name:
        room = Path(name)
        try:
            with _opened(archive) as tar:
                _extract_members(tar, room, archive, most)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise LuthierError("archive-damaged", f"it cannot be unpacked: {error}", where=str(archive)) from None
        return _moved(room, folder)


def _extract_members(tar: tarfile.TarFile, room: Path, archive: Path, most: int) -> None:
    total = 0
    for member in tar:
        total += member.size
        if not (member.isfile() or member.isdir()):
            raise _unsafe(archive, "a link or device", member.name)
        if total > most:
            raise _unsafe(archive, f"more than {most} bytes", member.name)
        try:
            tar.extract(member, room, filter="data")
        except tarfile.FilterError:
            raise _unsafe(archive, "a path that leaves the folder", member.name) from None


def _unsafe(archive: Path, what: str, name: str) -> LuthierError:
    return LuthierError("archive-unsafe", f"the archive holds {what}", where=str(archive), found=name)


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    with archive.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        if head != ZSTD:
            with tarfile.open(fileobj=file, mode="r|*") as tar:
                yield tar
            return
        with _unzstd(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            yield tar


@contextmanager
def _unzstd(archive: Path) -> Iterator[IO[bytes]]:
    """Yield the plain bytes of a zstd file, from the library `zstandard` or the program `zstd`."""
    if find_spec("zstandard") is not None:
        import zstandard

        with archive.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as plain:
            yield plain
        return
    program = shutil.which("zstd")
    if program is None:
        raise LuthierError("dependency-missing", "a zstd archive needs zstandard", where=str(archive),
                           remedy="Run: pip install zstandard")  # fmt: skip
    with subprocess.Popen([program, "-dc", str(archive)], stdout=subprocess.PIPE) as process:
        stream: Any = process.stdout
        yield stream


def _moved(room: Path, folder: Path) -> list[Path]:
    """Move what was unpacked into the folder, and return the files' new paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for path in sorted(room.rglob("*")):
        target = folder / path.relative_to(room)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)
            files.append(target)
    return files
