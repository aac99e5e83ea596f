"""Text that is piped into a verb: UTF-8, whatever the system's encoding is, without the mark that may begin a file."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator

from luthier.errors import LuthierError


def read_piped_text() -> str:
    """Return the whole of standard input. Raises `usage` if it is no text in UTF-8."""
    return decode_text(sys.stdin.buffer.read())


def read_piped_lines() -> Iterator[bytes]:
    """Yield the lines of standard input as they come, still to be decoded, the first one without its mark."""
    for number, line in enumerate(sys.stdin.buffer):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def decode_text(data: bytes) -> str:
    """Return bytes as text. Raises `usage`, which names the first byte that is none."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is no text in UTF-8"
        raise LuthierError("usage", problem, where="standard input", found=data[error.start : error.start + 1],
                           remedy="Convert it, for instance with iconv -t UTF-8.") from None  # fmt: skip
