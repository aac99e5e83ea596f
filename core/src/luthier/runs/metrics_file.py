"""The file of a run's metrics, metrics.jsonl: one JSON object a line, where null stands for NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, null read as NaN; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    parsed = (json.loads(line) for line in lines[:-1] if line)
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in parsed]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """One line, written at once."""
    with path.open("ab") as file:
        file.write(_text(line).encode())


def _text(line: dict[str, Any]) -> str:
    """JSON has no NaN: what is not finite, such as the loss of a step that was skipped, is null."""
    known = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in line.items()}
    return json.dumps(known, allow_nan=False) + "\n"
