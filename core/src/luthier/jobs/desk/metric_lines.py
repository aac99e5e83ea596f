"""Lines of a run's metrics as events of its job."""

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
    """A line as an event; its id is the same wherever in the file it stands, as a resumed run rewrites the file."""
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
    """Return the whole lines after an offset, at most `most` bytes of them; none of a file that cannot be read.

    A resumed run writes the file anew without its last lines: where it is shorter than the offset now, or has grown
    again so that no line ends there, it is read from its beginning, and a line that comes twice has the id that it had.
    """
    try:
        with path.open("rb") as file:
            details = os.fstat(file.fileno())
            offset = offset if _is_line_end(file, offset) else 0
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
