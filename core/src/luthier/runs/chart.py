"""A curve drawn with characters, for a terminal."""

from __future__ import annotations

from typing import Final

BLOCKS: Final = " ▁▂▃▄▅▆▇█"
HEIGHT: Final = 6


def draw_chart(points: list[tuple[int, float]], width: int, height: int = HEIGHT) -> list[str]:
    """Return a chart as lines of text, with one column for the mean of each of `width` stretches of steps.

    The vertical axis goes from the least to the greatest mean.
    """
    means = _means(points, width)
    known = [value for value in means if value is not None]
    if not known:
        return []
    low, high = min(known), max(known)
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    room = max(len(label) for label in labels)
    rows = [f"{label:>{room}} {_row(means, low, high, height - 1 - i, height)}" for i, label in enumerate(labels)]
    first, last = str(points[0][0]), str(points[-1][0])
    ends = first if first == last else f"{first} {last.rjust(len(means) - len(first) - 1)}"
    return [*(row.rstrip() for row in rows), " " * (room + 1) + ends]


def _means(points: list[tuple[int, float]], width: int) -> list[float | None]:
    """Return the mean of the values in each stretch; None for a stretch without values."""
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    width = min(width, last - first + 1)
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        columns[(step - first) * width // (last - first + 1)].append(value)
    return [sum(values) / len(values) if values else None for values in columns]


def _row(means: list[float | None], low: float, high: float, row: int, height: int) -> str:
    """Return one line, `row` from below. Each column fills it in eighths; the lowest column fills one eighth."""
    scale = (height * 8 - 1) / (high - low) if high > low else 0.0
    fills = [0 if mean is None else round((mean - low) * scale) + 1 for mean in means]
    return "".join(BLOCKS[min(max(fill - row * 8, 0), 8)] for fill in fills)
