"""loss.png: the metrics of a run over its steps, drawn at its end, and shown where the run is in a notebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.builtin import Plot
from luthier.builtin.notebook import runs_in_notebook, show_picture
from luthier.plugins.events import event
from luthier.runs.metrics_file import FILE, read_metrics
from luthier.runs.picture import PICTURE, draw_picture


class LossPlot:
    def __init__(self, options: Plot) -> None:
        self.options = options
        self.points: dict[str, list[tuple[int, float]]] = {}

    @event
    def resumed(self, run: Any, step: int) -> None:
        for line in read_metrics(run.folder / FILE):
            if line["step"] <= step:
                self._take(line["step"], line)

    @event
    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        self._take(step, metrics)

    @event
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._take(step, metrics)

    @event
    def stopped(self, run: Any) -> None:
        self._draw(run.folder / PICTURE, run.name)

    @event
    def completed(self, run: Any) -> None:
        self._draw(run.folder / PICTURE, run.name)

    def _take(self, step: int, metrics: Mapping[str, float]) -> None:
        for name in self.options.metrics:
            if math.isfinite(metrics.get(name, math.nan)):  # a skipped step has no loss to draw
                self.points.setdefault(name, []).append((step, metrics[name]))

    def _draw(self, path: Path, title: str) -> None:
        known = {name: self.points[name] for name in self.options.metrics if name in self.points}
        if known:
            draw_picture(known, path, title=title, smoothing=self.options.smoothing)
            if runs_in_notebook():
                show_picture(path)
