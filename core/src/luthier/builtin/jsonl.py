"""metrics.jsonl: one JSON object for each logging and each evaluation, every line whole at any moment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from luthier.builtin import Jsonl
from luthier.plugins.events import event
from luthier.runs.metrics_file import FILE, _text, read_metrics, write_line
from luthier.runs.other_names import add_names


class JsonLines:
    def __init__(self, options: Jsonl) -> None:
        self.options = options

    @event
    def resumed(self, run: Any, step: int) -> None:
        """Forget what a killed process wrote beyond its last checkpoint."""
        path = run.folder / FILE
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        aside = path.with_suffix(".aside")
        aside.write_text("".join(_text(line) for line in lines), "utf-8")
        os.replace(aside, path)

    @event
    def logged(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        write_line(run.folder / FILE, step, add_names(metrics, self.options.also))

    @event
    def evaluated(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        write_line(run.folder / FILE, step, add_names(metrics, self.options.also))
