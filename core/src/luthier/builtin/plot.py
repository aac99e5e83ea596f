"""loss.png: the metrics of a run over its steps, drawn at its end from metrics.jsonl or what was logged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.builtin import Plot
from luthier.builtin.jsonl import FILE, read
from luthier.plugins.events import event

PICTURE = "loss.png"


class LossPlot:
    def __init__(self, options: Plot) -> None:
        self.options = options
        self.points: dict[str, list[tuple[int, float]]] = {}

    @event
    def resumed(self, run: Any, step: int) -> None:
        for line in read(run.folder / FILE):
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
            draw(known, path, title=title, smoothing=self.options.smoothing)


def draw(points: Mapping[str, list[tuple[int, float]]], path: Path, *, title: str = "", smoothing: float = 0.9) -> None:
    """A PNG of each series of (step, value); long series get a smoothed line over the pale raw one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, series) in enumerate(points.items()):
        steps, values = zip(*series, strict=True)
        colour = f"C{number}"
        smooth = smoothing > 0 and len(values) >= 20
        axes.plot(steps, values, color=colour, alpha=0.3 if smooth else 1.0, linewidth=1.0 if smooth else 1.6,
                  marker="o" if len(values) < 40 else None, markersize=3, label=None if smooth else name)  # fmt: skip
        if smooth:
            axes.plot(steps, averaged(values, smoothing), color=colour, linewidth=1.8, label=f"{name} (smoothed)")
    axes.set(xlabel="step", ylabel=" / ".join(points) if len(points) < 3 else "value", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def averaged(values: tuple[float, ...], smoothing: float) -> list[float]:
    """The exponential moving average, corrected for its start."""
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = smoothing * total + value, smoothing * weight + 1.0
        found.append(total / weight)
    return found
