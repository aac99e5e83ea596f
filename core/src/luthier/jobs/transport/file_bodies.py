"""Files as request bodies: read block by block, with the progress reported."""

from __future__ import annotations

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
