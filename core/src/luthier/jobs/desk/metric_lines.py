"""Lines of a run's metrics file, read as events of its job."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO, Final

import attrs

from luthier.plugins.providing.job_records import JobEvent
from luthier.runs.metrics_file import finite_number

NUMBERS: Final = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")


def read_line_event(line: bytes, at: float) -> JobEvent | None:
    """Return a line as an event. Its id does not depend on its place, because a resumed run rewrites the file."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    numbers = {name: finite_number(values, name) for name in NUMBERS if name in values}
    if "total_tokens" in values:
        numbers["tokens"] = finite_number(values, "total_tokens")
    return JobEvent(id=hashlib.sha256(line).hexdigest()[:16], at=at, kind="metrics", metrics=numbers)


@attrs.frozen(kw_only=True)
class FreshLines:
    """Whole lines of a metrics file, the offset behind them, and the time at which the file was written."""

    lines: list[bytes]
    offset: int
    at: float = 0.0


def read_fresh_lines(path: Path, offset: int, most: int = -1) -> FreshLines:
    """Return the whole lines after an offset, at most `most` bytes of them; none if the file cannot be read.

    A resumed run writes the file again without its last lines. If the file is now shorter than the offset, or no line
    ends there, all of it is read from its beginning; a line that comes twice has the same id both times.
    """
    try:
        with path.open("rb") as file:
            details = os.fstat(file.fileno())
            if not _is_line_end(file, offset):
                offset, most = 0, -1  # all at once: a page of known lines alone would end the reading
            file.seek(offset)
            block = file.read(most)
    except OSError:
        return FreshLines(lines=[], offset=offset)
    whole = block[: block.rfind(b"\n") + 1]
    return FreshLines(lines=whole.splitlines(keepends=True), offset=offset + len(whole), at=details.st_mtime)


def _is_line_end(file: BinaryIO, offset: int) -> bool:
    """Return True if a line ends at this offset, or the file begins there."""
    file.seek(max(offset - 1, 0))
    return offset == 0 or file.read(1) == b"\n"
