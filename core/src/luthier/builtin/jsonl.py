"""metrics.jsonl: one JSON object for each logging and each evaluation, every line whole at any moment."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.builtin import Jsonl
from luthier.plugins.events import event

FILE = "metrics.jsonl"


class JsonLines:
    def __init__(self, options: Jsonl) -> None:
        self.options = options

    @event
    def resumed(self, run: Any, step: int) -> None:
        """Forget what a killed process wrote beyond its last checkpoint."""
        path = run.folder / FILE
        kept = [line for line in read(path) if line["step"] <= step]
        aside = path.with_suffix(".aside")
        aside.write_text("".join(_text(line) for line in kept), "utf-8")
        os.replace(aside, path)

    @event
    def logged(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        append(run.folder / FILE, {"step": step, **metrics})

    @event
    def evaluated(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        append(run.folder / FILE, {"step": step, **metrics})


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, null read as NaN; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    found = (json.loads(line) for line in lines[:-1] if line)
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in found]


def append(path: Path, line: dict[str, Any]) -> None:
    """One line, written at once."""
    with path.open("ab") as file:
        file.write(_text(line).encode())


def _text(line: dict[str, Any]) -> str:
    """JSON has no NaN: what is not finite, such as the loss of a step that was skipped, is null."""
    known = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in line.items()}
    return json.dumps(known, allow_nan=False) + "\n"
