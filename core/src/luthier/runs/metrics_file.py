"""The file of a run's metrics, metrics.jsonl: one JSON object a line, in which null stands for NaN."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from luthier.logs import get_logger
from luthier.timestamp import current_time

log = get_logger()
FILE = "metrics.jsonl"
FORMAT: Final = 1  # of a line; it grows with a change that an older reader would misread
TAIL: Final = 2**16  # bytes, more than a hundred lines of metrics
NUMBER: Final = (int, float)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics file, with null read as NaN. A line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    parsed = list(parse_lines(lines))
    if len(parsed) < len(lines):
        log.warning("lines of the metrics that a kill cut short are left out", file=str(path),
                    lines=len(lines) - len(parsed))  # fmt: skip
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in parsed]


def write_line(path: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Append the metrics of a step, after the number of the format and the time."""
    append_line(path, {"format": FORMAT, "timestamp": current_time(), "step": step, **metrics})


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one line in a single write. It starts a new line if a kill cut the last one short."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        # the file is open for appending, so reading here does not move where it writes
        cut = end > 0 and file.read(1) != b"\n"
        if cut:
            log.warning("the last line of the metrics was cut short by a kill, and is left as it is", file=str(path))
        file.write(b"\n" * cut + _text(line).encode())


def last_lines(path: Path, size: int = TAIL) -> list[bytes]:
    """Return the lines in the last `size` bytes of a file, oldest first; an empty list if it cannot be read."""
    try:
        with path.open("rb") as file:
            begin = max(file.seek(0, os.SEEK_END) - size, 0)
            file.seek(begin)
            return file.read(size).splitlines()[begin > 0 :]
    except OSError:
        return []


def parse_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects that lines hold, without lines that a kill cut short."""
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def finite_number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a finite number of a record or a line of metrics; None if it is absent or anything else."""
    value = values.get(name)
    if not isinstance(value, NUMBER) or isinstance(value, bool):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # of integers larger than every float
        return None


def _text(line: dict[str, Any]) -> str:
    """Return a line as JSON, which has no NaN: a value that is not finite, as a skipped step's loss, becomes null."""
    known = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in line.items()}
    return json.dumps(known, allow_nan=False) + "\n"
