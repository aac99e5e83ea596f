"""Blocks of lines: files of JSON Lines cut into parts, each of which any process can read by itself."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import attrs

from luthier.data.read import row_limit
from luthier.data.read.jsonfiles import check_first_line
from luthier.data.read.packed_rows import BLOCK
from luthier.data.read.textfiles import BOM, open_bytes

SUFFIXES: Final = (".jsonl", ".ndjson")


class LinesRefused(Exception):
    """A file cannot be read in blocks: reading it in order says why, or can do it."""


@attrs.frozen(kw_only=True)
class LineBlock:
    """Some lines of a file. `octets` are their bytes if the file can only be read in order."""

    path: str
    offset: int
    size: int  # in bytes
    first: int  # the number of the first line, from 1
    count: int  # lines that are not blank
    begins: bool  # True if it has the first line of the file that is not blank
    octets: bytes | None = None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the text of each line that is not blank, and its place. Raises LinesRefused, or ValueError."""
        octets, begins = self._read(), self.begins
        if self.first == 1:
            octets = octets.removeprefix(BOM)
        if b"\0" in octets:
            raise LinesRefused
        for number, line in enumerate(octets.decode().split("\n"), self.first):
            if text := line.strip():
                where = f"{self.path}:{number}"
                if begins:
                    check_first_line(text, where)
                    begins = False
                yield text, where

    def _read(self) -> bytes:
        if self.octets is not None:
            return self.octets
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


@attrs.frozen(kw_only=True)
class LineFile:
    """A file of JSON Lines that was cut into blocks, and the state in which it was."""

    path: Path
    blocks: Sequence[LineBlock]
    state: Any

    @classmethod
    def of(cls, path: Path) -> LineFile:
        """Cut a file. Raises LinesRefused if it holds no line, or one larger than a row may be, or is damaged."""
        state = _state(path)
        try:
            with open_bytes(path) as stream:
                blocks = list(_cut(stream, str(path)))
        except (OSError, EOFError, zlib.error):
            raise LinesRefused from None
        if not blocks:
            raise LinesRefused
        return cls(path=path, blocks=blocks, state=state)

    @property
    def is_same(self) -> bool:
        """Return True if nobody has written to the file since it was cut."""
        return bool(_state(self.path) == self.state)

    def loaded(self) -> Iterator[LineBlock]:
        """Yield the blocks in order, with their bytes if the file is compressed."""
        if self.path.suffix != ".gz":
            yield from self.blocks
            return
        with gzip.open(self.path) as stream:
            for block in self.blocks:
                stream.seek(block.offset)
                yield attrs.evolve(block, octets=stream.read(block.size))


def _state(path: Path) -> Any:
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _cut(stream: BinaryIO, path: str) -> Iterator[LineBlock]:
    """Yield the blocks of a file, each with as many lines that are not blank as are tokenised together."""
    most = 4 * row_limit.LIMIT + 2
    begin = end = count = 0
    first = number = 1
    is_begun = False
    while raw := stream.readline(most):
        if len(raw) == most:
            raise LinesRefused
        end += len(raw)
        number += 1
        count += bool(raw.strip())
        if count == BLOCK:
            yield LineBlock(path=path, offset=begin, size=end - begin, first=first, count=count, begins=not is_begun)
            is_begun, begin, first, count = True, end, number, 0
    if count:
        yield LineBlock(path=path, offset=begin, size=end - begin, first=first, count=count, begins=not is_begun)
