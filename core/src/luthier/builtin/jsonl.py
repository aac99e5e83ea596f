"""metrics.jsonl: one JSON object for each logging and each evaluation, every line whole at any moment."""

from __future__ import annotations

import json
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
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        os.replace(aside, path)

    @event
    def logged(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        _append(run.folder / FILE, {"step": step, **metrics})

    @event
    def evaluated(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        _append(run.folder / FILE, {"step": step, **metrics})


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(line).encode() + b"\n")
