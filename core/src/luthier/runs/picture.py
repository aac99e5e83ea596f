"""The picture of a run's metrics, loss.png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PICTURE = "loss.png"


def draw_picture(
    points: Mapping[str, list[tuple[int, float]]], path: Path, *, title: str = "", smoothing: float = 0.9
) -> None:
    """Write a PNG of each series of (step, value). A long series gets a smoothed line over its pale raw one."""
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
    """Return the exponential moving average of the values, corrected for its start at zero."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        total, weight = smoothing * total + value, smoothing * weight + 1.0
        means.append(total / weight)
    return means
