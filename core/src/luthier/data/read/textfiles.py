"""Bytes of a file, plain or gzipped, as UTF-8 lines with their numbers; and plain text as documents."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from luthier.data.read import row_limit
from luthier.data.read.remote_files import RemoteFile
from luthier.data.read.row import Row, unreadable_row

BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"


def open_bytes(path: Path) -> BinaryIO:
    """Open the file's bytes, unpacked if its name ends in .gz."""
    try:
        if isinstance(path, RemoteFile) and path.suffix == ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=path.open()))
        return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise unreadable_row(str(path), f"the file cannot be opened: {error.strerror or error}") from None


def read_lines(path: Path, *, limited: bool = True) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line, line end included. Raises `data-unreadable` if it is not
    UTF-8.

    Raises `data-row` for a line that is larger than a row may be, unless the lines are not `limited`.
    """
    with open_bytes(path) as stream:
        number, most = 1, 4 * row_limit.LIMIT + 2 if limited else -1
        while raw := _next_line(stream, path, number, most):
            if len(raw) == most:
                raise row_limit.oversized_row(len(raw), f"{path}:{number}")
            yield number, _decoded(raw, path, number)
            number += 1


def read_whole(path: Path) -> str:
    return "".join(line for _, line in read_lines(path, limited=False))


def read_bytes(path: Path) -> bytes:
    """Return all bytes, unpacked. Raises `data-unreadable` if the gzip stream is damaged."""
    with open_bytes(path) as stream:
        try:
            return stream.read()
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable_row(str(path), f"the file is damaged or cut short: {error}") from None


def _next_line(stream: BinaryIO, path: Path, number: int, most: int) -> bytes:
    try:
        return stream.readline(most)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable_row(f"{path}:{number}", f"the file is damaged or cut short: {error}") from None


def _decoded(raw: bytes, path: Path, number: int) -> str:
    where = f"{path}:{number}"
    if number == 1:
        raw = raw.removeprefix(BOM)
        if raw.startswith(UTF16):
            raise unreadable_row(where, "the file is UTF-16", remedy="Save it as UTF-8.")
        if raw.startswith(GZIP):
            raise unreadable_row(where, "the file is gzipped, but its name does not end in .gz", remedy="Rename it.")
    if b"\0" in raw:
        raise unreadable_row(where, "the file is binary: it holds a NUL byte")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        octets = raw[error.start : error.start + 8]
        raise unreadable_row(where, "the line is not UTF-8", octets, "Save the file as UTF-8.") from None


def read_text(path: Path, unit: str) -> Iterator[Row]:
    """Yield documents as rows `{text: ...}`: lines, paragraphs (between blank lines), or the file; no blank ones."""
    if unit == "file":
        yield from _document(read_whole(path), path, 1)
    elif unit == "line":
        for number, line in read_lines(path):
            yield from _document(line.rstrip("\r\n"), path, number)
    else:
        yield from _paragraphs(path)


def _document(text: str, path: Path, number: int) -> Iterator[Row]:
    if text.strip():
        yield Row({"text": text}, f"{path}:{number}")


def _paragraphs(path: Path) -> Iterator[Row]:
    """Yield paragraphs. A blank line ends a paragraph, except inside a ChatML turn that began in it."""
    lines: list[str] = []
    first, opened = 1, False
    for number, line in read_lines(path):
        if not line.strip() and not opened:
            yield from _document("".join(lines).rstrip("\r\n"), path, first)
            lines = []
            continue
        if not lines:
            first, opened = number, False
        lines.append(line)
        if lines[0].startswith(CHATML_START):
            opened = _still_open(line, opened)
    yield from _document("".join(lines).rstrip("\r\n"), path, first)


def _still_open(line: str, opened: bool) -> bool:
    start, end = line.rfind(CHATML_START), line.rfind(CHATML_END)
    return opened if start == end == -1 else start > end
