"""A survey of a run's metrics in bounded memory: the range of each number, and the curves of the losses."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import attrs

from luthier.runs.metrics_file import finite_number, parse_lines

RATES: Final = ("tokens_per_second",)  # of a rate the median says most, of other metrics the last value
DRAWN: Final = ("loss", "eval_loss")
NO_METRICS: Final = {"step", "format"}  # numbers that say which line it is, and how it is written
BLOCK: Final = 1 << 22  # bytes that are read at once
KEPT: Final = 1 << 16  # the most points of a curve, and the most values that a median is taken of


@attrs.define
class Range:
    """The first, last, least and greatest value of a metric so far; of a rate also an even sample, for the median."""

    first: float
    last: float
    least: float
    greatest: float
    sample: list[float] | None = None
    seen: int = 0
    every: int = 1  # the sample has one of so many values

    def add(self, values: Any, least: float, greatest: float) -> None:
        """Add further values, a list or an array, together with the least and the greatest of them."""
        self.last, self.least, self.greatest = float(values[-1]), min(self.least, least), max(self.greatest, greatest)
        if self.sample is None:
            return
        self.sample += [float(value) for value in values[-self.seen % self.every :: self.every]]
        self.seen += len(values)
        while len(self.sample) > KEPT:
            self.sample, self.every = self.sample[::2], 2 * self.every

    def to_dict(self) -> dict[str, float]:
        summary = {"first": self.first, "last": self.last, "least": self.least, "greatest": self.greatest}
        return summary if self.sample is None else {**summary, "median": median(self.sample)}


@attrs.define
class Curve:
    """The points of a metric. Beyond `KEPT` points, each is the mean of equally many successive values."""

    # step -> value; of several lines with one step the last counts
    points: dict[int, float] = attrs.field(factory=dict)
    each: int = 1
    begun: list[tuple[int, float]] = attrs.field(factory=list)  # values of a point that is not complete
    newest: int = -1  # the last step that was added

    def add(self, points: Iterable[tuple[int, float]]) -> None:
        """Add further points in their order.

        Steps that come again mean that the run went on from an earlier checkpoint.
        """
        listed = list(points)
        steps = [self.newest, *(step for step, _ in listed)]
        starts = [i for i in range(len(listed)) if steps[i + 1] <= steps[i]]
        for start, end in itertools.pairwise(sorted({0, *starts, len(listed)})):
            self._take(listed[start:end])
        self.newest = steps[-1]

    def _take(self, points: list[tuple[int, float]]) -> None:
        """Add points of rising steps."""
        if self.each == 1:
            self.points.update(points)
        else:
            if points[0][0] <= self.newest:
                self._forget(points[0][0])
            self.begun += points
            end = len(self.begun) - len(self.begun) % self.each
            self.points.update(_mean(self.begun[i : i + self.each]) for i in range(0, end, self.each))
            del self.begun[:end]
        self.newest = points[-1][0]
        while len(self.points) > KEPT:
            self._thin()

    def _forget(self, step: int) -> None:
        """Drop the points from a step on, because a resumed run gives these steps again."""
        self.points = {first: value for first, value in self.points.items() if first < step}
        self.begun = [point for point in self.begun if point[0] < step]

    def _thin(self) -> None:
        listed = sorted(self.points.items())
        rest = listed[len(listed) - len(listed) % 2 :]  # the last point if their number is odd: half of a future point
        pairs = zip(listed[::2], listed[1::2], strict=False)
        self.points, self.each = dict(map(_mean, pairs)), 2 * self.each
        self.begun = rest * (self.each // 2) + self.begun

    def series(self) -> list[tuple[int, float]]:
        return sorted([*self.points.items(), *([_mean(self.begun)] if self.begun else [])])


def _mean(points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Return the step of the first of some points, and the mean of their values."""
    return points[0][0], sum(value for _, value in points) / len(points)


@attrs.define
class Survey:
    """The ranges and the curves of the metrics in a metrics file."""

    ranges: dict[str, Range] = attrs.field(factory=dict)
    curves: dict[str, Curve] = attrs.field(factory=dict)

    def add(self, name: str, values: Any, least: float, greatest: float) -> None:
        """Add values of a metric in their order."""
        if name not in self.ranges:
            first = float(values[0])
            self.ranges[name] = Range(first, first, first, first, [] if name in RATES else None)
        self.ranges[name].add(values, least, greatest)

    def draw(self, name: str, points: Iterable[tuple[int, float]]) -> None:
        """Add points to the curve of a metric that is drawn."""
        self.curves.setdefault(name, Curve()).add(points)

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return the (step, value) points of a drawn metric, sorted by step."""
        return self.curves[name].series() if name in self.curves else []


def survey_metrics(path: Path, block: int = BLOCK) -> Survey:
    """Read a metrics file once. Lines that a kill cut short, and lines that are no metrics, are left out."""
    survey = Survey()
    large = path.is_file() and path.stat().st_size > block
    for lines in _blocks(path, block):
        if not (large and _add_columns(survey, lines)):
            _add_lines(survey, lines)
    return survey


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    """Yield the file in blocks that end with a line."""
    rest = b""
    try:
        with path.open("rb") as file:
            while block := file.read(size):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    yield whole + newline
    except OSError:
        return
    if rest:
        yield rest


def _add_lines(survey: Survey, block: bytes) -> None:
    for line in parse_lines(block.splitlines()):
        step = finite_number(line, "step")
        for name in line:
            value = finite_number(line, name)
            if value is None or name in NO_METRICS:
                continue
            survey.add(name, (value,), value, value)
            if name in DRAWN and step is not None:
                survey.draw(name, [(int(step), value)])


def _add_columns(survey: Survey, block: bytes) -> bool:
    """Add many lines at once, read by pyarrow. Return False if pyarrow is absent or cannot read a line."""
    try:
        import pyarrow as pa
        from pyarrow import json
    except ImportError:
        return False
    try:
        table = json.read_json(io.BytesIO(block), read_options=json.ReadOptions(block_size=len(block) + 1))
    except pa.ArrowInvalid:
        return False
    names = table.column_names
    if len(set(names)) != len(names):
        return False
    numbers = {name: floats for name in names if (floats := _floats(table[name])) is not None}
    for name, column in numbers.items():  # in the order of the file
        if name not in NO_METRICS:
            _add_column(survey, name, column, numbers.get("step"))
    return True


def _add_column(survey: Survey, name: str, values: Any, steps: Any) -> None:
    import numpy as np

    is_finite = np.isfinite(values)
    finite = values[is_finite]
    if len(finite):
        survey.add(name, finite, float(finite.min()), float(finite.max()))
    if name in DRAWN and steps is not None:
        is_finite &= np.isfinite(steps)
        survey.draw(name, zip(steps[is_finite].astype(np.int64).tolist(), values[is_finite].tolist(), strict=True))


def _floats(column: Any) -> Any:
    """Return [N] float64, with NaN for entries that are no numbers; None if the column has no numbers."""
    from pyarrow import types

    kind = column.type
    is_number = types.is_integer(kind) or types.is_floating(kind)
    return column.cast("float64", safe=False).to_numpy() if is_number else None  # large integers are rounded
