"""Files as request bodies: read block by block, with the progress reported."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import BinaryIO, Final

from luthier.errors import LuthierError
from luthier.plugins.providing.job_records import Progress

BLOCK: Final = 2**18  # bytes


class CountedFile:
    """A binary file that reports how much of it has been read. The reported number never decreases."""

    def __init__(self, stream: BinaryIO, size: int, progress: Progress | None) -> None:
        self._stream, self._size, self._progress, self._most = stream, size, progress, 0

    def read(self, count: int = -1) -> bytes:
        """Read at most `count` bytes; -1 reads all."""
        block = self._stream.read(count)
        if self._stream.tell() > self._most:
            self._most = self._stream.tell()
            if self._progress is not None:
                self._progress(self._most, self._size)
        return block

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def fileno(self) -> int:
        return self._stream.fileno()


class FilePart:
    """A part of a binary file that reads like a file of its own: `size` bytes from `begin`, or what is left of them.

    It has no `fileno`, by which a library would measure the whole file.
    """

    def __init__(self, stream: BinaryIO, begin: int, size: int) -> None:
        self._stream, self._begin, self._place = stream, begin, 0
        self._size = min(size, max(stream.seek(0, os.SEEK_END) - begin, 0))

    def read(self, count: int = -1) -> bytes:
        """Read at most `count` bytes of the part; -1 reads all that is left."""
        left = max(self._size - self._place, 0)
        self._stream.seek(self._begin + self._place)
        block = self._stream.read(left if count < 0 else min(count, left))
        self._place += len(block)
        return block

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset within the part, and return it."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place


async def send_blocks(stream: BinaryIO, size: int, progress: Progress | None) -> AsyncIterator[bytes]:
    """Yield a file's blocks. Raises `data-changed` if its size has changed since it was measured."""
    sent = 0
    while block := stream.read(BLOCK):
        sent += len(block)
        if sent > size:
            break
        yield block
        if progress is not None:
            progress(sent, size)
    if sent != size:
        raise LuthierError("data-changed", "the file changed while it was sent", where=str(getattr(stream, "name", "")))
