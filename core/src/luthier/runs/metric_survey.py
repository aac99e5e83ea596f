"""A survey of a run's metrics in bounded memory: the range of each number, and the curves of the losses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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
        self.sample += map(float, values[-self.seen % self.every :: self.every])
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

    def add(self, steps: Any, values: Any) -> None:
        """Add further points in their order: the steps and the values, both as lists or both as arrays.

        Steps that come again mean that the run went on from an earlier checkpoint.
        """
        starts = [i for i in _falls(steps, self.newest) if i]
        for start, end in itertools.pairwise([0, *starts, len(steps)]):
            self._take(steps[start:end], values[start:end])

    def _take(self, steps: Any, values: Any) -> None:
        """Add points of rising steps."""
        first = int(steps[0])
        if self.each > 1 and first <= self.newest:
            self._forget(first)
        place = 0
        while place < len(steps):
            place += self._fill(steps[place:], values[place:])
            if len(self.points) > KEPT:
                self._thin()
        self.newest = int(steps[-1])

    def _fill(self, steps: Any, values: Any) -> int:
        """Add the first of some points, and return how many: those that complete a point, or whole points until the
        curve must be thinned."""
        count = self.each - len(self.begun)
        if count == self.each and count <= len(steps):
            count = self.each * min(len(steps) // self.each, KEPT + 1 - len(self.points))
            self.points.update(_means(steps[:count], values[:count], self.each))
            return int(count)
        added = zip(_plain(steps[:count]), _plain(values[:count]), strict=True)
        self.begun += added
        if len(self.begun) == self.each:
            self.points.update([_mean(self.begun)])
            self.begun = []
        return min(count, len(steps))

    def _forget(self, step: int) -> None:
        """Drop the points from a step on, because a resumed run gives these steps again."""
        self.points = {first: value for first, value in self.points.items() if first < step}
        self.begun = [point for point in self.begun if point[0] < step]

    def _thin(self) -> None:
        listed = sorted(self.points.items())
        rest = listed[len(listed) - len(listed) % 2 :]  # the last point if their number is odd: half of a future point
        pairs = zip(listed[::2], listed[1::2], strict=False)
        self.points, self.each = {step: (one + other) / 2 for (step, one), (_, other) in pairs}, 2 * self.each
        self.begun = rest * (self.each // 2) + self.begun

    def series(self) -> list[tuple[int, float]]:
        return sorted([*self.points.items(), *([_mean(self.begun)] if self.begun else [])])


def _mean(points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Return the step of the first of some points, and the mean of their values."""
    return points[0][0], sum(value for _, value in points) / len(points)


def _plain(values: Any) -> list[Any]:
    """Return the entries of a list or an array as plain numbers."""
    return values if isinstance(values, list) else values.tolist()


def _falls(steps: Any, before: int) -> list[int]:
    """Return the places of steps that are not above the step before them, which is `before` for the first one."""
    if isinstance(steps, list):
        return [i for i, (last, step) in enumerate(itertools.pairwise([before, *steps])) if step <= last]
    return [*([0] if steps[0] <= before else ()), *((steps[1:] <= steps[:-1]).nonzero()[0] + 1).tolist()]


def _means(steps: Any, values: Any, each: int) -> Iterator[tuple[int, float]]:
    """Return one point for each `each` successive points: the first of their steps, and the mean of their values."""
    if isinstance(values, list):
        means = [sum(values[i : i + each]) / each for i in range(0, len(values), each)]
    else:
        means = values.reshape(-1, each).mean(1).tolist()
    return zip(_plain(steps[::each]), means, strict=True)


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

    def draw(self, name: str, steps: Any, values: Any) -> None:
        """Add points to the curve of a metric that is drawn: lists or arrays, at least one point."""
        self.curves.setdefault(name, Curve()).add(steps, values)

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return the (step, value) points of a drawn metric, sorted by step."""
        return self.curves[name].series() if name in self.curves else []


def survey_metrics(path: Path, block: int = BLOCK) -> Survey:
    """Read a metrics file once. Lines that a kill cut short, and lines that are no metrics, are left out."""
    survey = Survey()
    large = path.is_file() and path.stat().st_size > block
    numbers: list[str] = []  # the metrics that the blocks so far had, which are then read as numbers at once
    for lines in _blocks(path, block):
        if not (large and _add_columns(survey, lines, numbers)):
            _add_lines(survey, bytes(lines))
    return survey


def _blocks(path: Path, size: int) -> Iterator[memoryview]:
    """Yield the file in blocks that end with a line, each in the same memory, so that it holds until the next."""
    buffer, rest = bytearray(size), 0
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(memoryview(buffer)[rest:]):
                filled = rest + count
                end = buffer.rfind(b"\n", 0, filled) + 1
                if end:
                    yield memoryview(buffer)[:end]
                rest = filled - end
                if end:
                    buffer[:rest] = buffer[end:filled]
                elif rest == len(buffer):
                    buffer = buffer + bytes(rest)  # room for a line longer than the buffer
    except OSError:
        return
    if rest:
        yield memoryview(buffer)[:rest]


def _add_lines(survey: Survey, block: bytes) -> None:
    for line in parse_lines(block.splitlines()):
        step = finite_number(line, "step")
        for name in line:
            value = finite_number(line, name)
            if value is None or name in NO_METRICS:
                continue
            survey.add(name, (value,), value, value)
            if name in DRAWN and step is not None:
                survey.draw(name, [int(step)], [value])


def _add_columns(survey: Survey, block: memoryview, numbers: list[str]) -> bool:
    """Add many lines at once, read by pyarrow. Return False if pyarrow is absent or cannot read a line.

    `numbers` are the names of metrics seen before, and new ones are added to it.
    """
    try:
        import pyarrow as pa
        from pyarrow import json
    except ImportError:
        return False
    schema = pa.schema([(name, pa.float64()) for name in numbers])
    try:
        table = json.read_json(
            pa.BufferReader(block),
            read_options=json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=json.ParseOptions(explicit_schema=schema),
        )
    except pa.ArrowInvalid:
        return False
    names = table.column_names
    if len(set(names)) != len(names):
        return False
    columns = {name: floats for name in names if (floats := _floats(table[name])) is not None}
    numbers += [name for name in columns if name not in numbers]
    for name, column in columns.items():  # in the order of the file
        if name not in NO_METRICS:
            _add_column(survey, name, column, columns.get("step"))
    return True


def _add_column(survey: Survey, name: str, values: Any, steps: Any) -> None:
    import numpy as np

    is_finite = np.isfinite(values)
    finite = values if is_finite.all() else values[is_finite]
    if len(finite):
        survey.add(name, finite, float(finite.min()), float(finite.max()))
    if name in DRAWN and steps is not None:
        is_finite &= np.isfinite(steps)
        if is_finite.any():
            survey.draw(name, steps[is_finite].astype(np.int64), values[is_finite])


def _floats(column: Any) -> Any:
    """Return [N] float64, with NaN for entries that are no numbers; None if the column has no numbers."""
    from pyarrow import types

    kind = column.type
    is_number = types.is_integer(kind) or types.is_floating(kind)
    return column.cast("float64", safe=False).to_numpy() if is_number else None  # large integers are rounded
