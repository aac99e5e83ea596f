"""Streams: rows that are read and tokenised during the run, in bounded memory, starting at any place."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import attrs
import numpy as np

from luthier.data.cache import WITHOUT
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.formats.bad_rows import count_faults, settle_faults
from luthier.data.formats.forms import Form
from luthier.data.formats.read_rows import ReadRows
from luthier.data.formats.recognise_form import SAMPLE
from luthier.data.formats.remarks import warnings_of
from luthier.data.formats.wanted import TOKENS, Wanted
from luthier.data.read.content_hash import tokenizer_hash
from luthier.data.read.row import Row
from luthier.data.report import Report
from luthier.data.source_mix import weigh_sources
from luthier.data.stream.source_lines import FILE_ROWS, Line, Place, make_lines
from luthier.data.stream.stream_units import Unit, fingerprint_units, source_units
from luthier.data.tokenise.examples_of_rows import Made, Maker
from luthier.data.tokenise.token_blocks import Blocks
from luthier.data.tokenise.workers import working_processes
from luthier.errors import LuthierError
from luthier.recipe.schema import Data, Source

ROWS: Final = 64  # rows that are read and tokenised together
CHARACTERS: Final = 1 << 20  # fewer rows if they have more characters

Formatted = tuple[Unit, str]  # a unit, and the format of its rows
FormOf = Callable[[Data, Sequence[Row], Source, Wanted], str]


@attrs.frozen(kw_only=True)
class Part:
    """Rows that are made together: the place where they end, the index of the first, and what was read."""

    end: Place
    first: int
    read: ReadRows


Arrived = tuple[int, Made, Place]  # the number of a line, what was made of its next rows, and where they end


@attrs.define(kw_only=True, eq=False)
class Stream:
    """The rows of all sources. Several files come in a different order in each epoch."""

    data: Data
    maker: Maker
    units: list[Formatted]
    sources: Sequence[Source]
    lines: list[Line]
    fingerprint: str
    sample: TokenDataset  # made of the first rows of each source
    report: Report  # on the sample
    wanted: Wanted
    checks: list[Callable[[TokenDataset], None]] = attrs.field(factory=list)

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest example."""
        return self.data.block_size or self.data.max_length * max(len(self.sample.names), 1)

    @property
    def longest_document(self) -> int:
        """Return the number of tokens that a document may have."""
        return self.data.block_size or self.data.max_length

    def check(self, check: Callable[[TokenDataset], None]) -> None:
        """Call `check` on the sample now, and on everything that is read later before it is trained on."""
        check(self.sample)
        self.checks.append(check)

    def parts(self, seed: int, epoch: int, places: Sequence[Place]) -> Parts:
        """Return what is made of the rows after `places`, one place for each line, until the epoch's end."""
        return Parts(self, seed, epoch, places)

    def head(self, count: int) -> list[TokenExample]:
        """Return the first examples in the order of reading."""
        blocks, examples = self.blocks(), []  # type: ignore[var-annotated]
        parts = self.parts(0, 0, [Place()] * len(self.lines))
        for _, made, _ in parts.every():
            examples += blocks.add(made.examples) if blocks else made.examples
            if len(examples) >= count:
                break
        return (examples or list(blocks.end() if blocks else ()))[:count]

    def blocks(self) -> Blocks | None:
        """Return what cuts an epoch's documents into blocks; None if they are not to be cut."""
        return Blocks(size=self.data.block_size) if self.data.block_size is not None else None

    def count_sources(self, taken: Mapping[str, int]) -> list[dict[str, Any]]:
        """Return how many rows of each source an epoch had, by the sources' numbers, and say it in the report."""
        total = sum(taken.values())
        self.report.sources = [
            {"path": source.path, "repeat": source.repeat, "weight": source.weight,
             "epoch_rows": taken.get(str(number), 0), "share": taken.get(str(number), 0) / total}
            for number, source in enumerate(self.sources if total and len(self.sources) > 1 else ())
        ]  # fmt: skip
        return self.report.sources

    def read_line(self, number: int, seed: int, epoch: int, place: Place) -> Iterator[Part]:
        """Yield the next rows of a line, after `place`."""
        line = self.lines[number]
        for times in itertools.count(place.times) if line.passes is None else range(place.times, line.passes):
            order = line.order(number, seed, epoch, times)
            for turn in range(place.unit, len(order)):
                unit, form = self.units[order[turn]]
                count = place.row
                for rows in _parted(unit.rows(count)):
                    rows_read = ReadRows()
                    rows_read.add(rows, form, self.wanted)
                    first, count = order[turn] * FILE_ROWS + count, count + len(rows)
                    yield Part(end=Place(turn, count, times), first=first, read=rows_read)
                place = Place(turn + 1, 0, times)
            place = Place()

    def checked(self, made: Made, part: Part) -> Made:
        """Return what was made of a part, checked. Its bad rows are an error, unless the recipe drops them."""
        numbers = np.array(part.read.numbers, np.int64)
        weight = np.float32(self.units[part.first // FILE_ROWS][0].source.weight)
        made.examples = attrs.evolve(
            made.examples.renumbered(part.first + numbers), weights=made.examples.weights * weight
        )
        own = [attrs.evolve(fault, number=int(numbers[fault.number])) for fault in made.faults]
        made.rows, made.faults = part.read.count, sorted([*part.read.faults, *own], key=lambda fault: fault.number)
        settle_faults(made.faults, made.rows, _unlimited(self.data))
        made.drops.update(count_faults(made.faults))
        for check in self.checks:
            check(made.examples)
        return made


class Parts:
    """What is made of the rows of an epoch. Each line is read in its order, as far as somebody asks for it."""

    def __init__(self, stream: Stream, seed: int, epoch: int, places: Sequence[Place]) -> None:
        self._stream = stream
        self._lines = [stream.read_line(number, seed, epoch, place) for number, place in enumerate(places)]
        self._open = set(range(len(places)))  # lines that may have further rows
        self._ahead = [0] * len(places)  # parts of each line that were begun and not yet asked for
        self._arrived: list[deque[tuple[Made, Place]]] = [deque() for _ in places]
        self._asked = 0
        self._made = self._make()

    def next_of(self, line: int) -> tuple[Made, Place] | None:
        """Return what is made of the next rows of a line, and where they end; None at its end."""
        self._asked = line
        while not self._arrived[line]:
            if line not in self._open and not self._ahead[line]:
                return None
            if (made := next(self._made, None)) is not None:
                self._arrived[made[0]].append(made[1:])
        self._ahead[line] -= 1
        return self._arrived[line].popleft()

    def every(self) -> Iterator[Arrived]:
        """Yield what is made of the rows of all lines, which take turns."""
        for made in self._made:
            self._ahead[made[0]] -= 1
            yield made

    def _make(self) -> Iterator[Arrived]:
        stream, read = self._stream, deque[tuple[int, Part]]()
        forms, count = self._forms(read), stream.data.num_proc or 1

        def arrived(made: Made) -> Arrived:
            line, part = read.popleft()
            return line, stream.checked(made, part), part.end

        if count == 1:
            yield from (arrived(stream.maker.make(part)) for part in forms)
            return
        with working_processes(stream.maker, count) as workers:
            yield from map(arrived, map(stream.maker.make, forms) if workers is None else workers.made(forms))

    def _forms(self, read: deque[tuple[int, Part]]) -> Iterator[Sequence[Form]]:
        """Yield the forms of the next rows, of the line that is least far ahead. The rest is appended to `read`."""
        while self._open:
            line = min(self._open, key=lambda number: (self._ahead[number], number != self._asked, number))
            part = next(self._lines[line], None)
            if part is None:
                self._open.discard(line)
                continue
            self._ahead[line] += 1
            read.append((line, part))
            yield part.read.forms


def stream_of(data: Data, maker: Maker, form_of: FormOf, wanted: Wanted, given: Any = None) -> Stream:
    """Return the stream of a recipe's training rows, or of rows from Python, with each source's format recognised."""
    sources = data.train
    if given is not None:
        sources = [attrs.evolve(data.train[0] if len(data.train) == 1 else Source(path="data"), path="data")]
    units, counts, samples, read = list[Formatted](), list[int](), [], ReadRows()
    for source in sources:
        own = source_units(source, given, data.text_unit)
        rows = list(islice(own[0].rows(), SAMPLE))
        if not rows:
            raise LuthierError("data-empty", "there are no rows", where=source.path)
        form = form_of(data, rows, source, wanted)
        units += [(unit, form) for unit in own]
        counts.append(len(own))
        samples.append(rows)
        read.add(rows, form, wanted, source)
    made = maker.make(read.forms)
    made.faults = [*read.faults, *made.faults]
    settle_faults(made.faults, read.count, data if all(len(rows) < SAMPLE for rows in samples) else _unlimited(data))
    return Stream(
        data=data,
        maker=maker,
        units=units,
        sources=sources,
        lines=make_lines(sources, counts),
        fingerprint=fingerprint_units([unit for unit, _ in units], samples, **_ingredients(data, maker, wanted)),
        sample=weigh_sources(made.examples.renumbered(np.array(read.numbers, np.int64)), read.parts),
        report=_report(made, read, maker),
        wanted=wanted,
    )


def _unlimited(data: Data) -> Data:
    """Return the options without the limit of bad rows, which the feed applies to all rows it reads."""
    return attrs.evolve(data, max_bad_rows=None)


def _ingredients(data: Data, maker: Maker, wanted: Wanted) -> dict[str, Any]:
    """Return everything besides the rows that decides the examples."""
    options = attrs.asdict(data, filter=lambda field, _: field.name not in WITHOUT)
    template = None if maker.template is None else maker.template.text
    ingredients: dict[str, Any] = {
        "options": options,
        "tokenizer": tokenizer_hash(maker.encoder.tokenizer),
        "template": template,
    }
    if not all(source.weight == 1.0 for source in data.train):
        ingredients["weights"] = [source.weight for source in data.train]
    return ingredients if wanted == TOKENS else {**ingredients, "wanted": attrs.asdict(wanted)}


def _report(made: Made, read: ReadRows, maker: Maker) -> Report:
    report = Report(format=read.name, rows=read.count, drops=made.drops, changes=made.changes)
    report.unrendered = made.unrendered
    report.add_faults(made.faults)
    report.measure(made.examples)
    scope = f"rows are read during the run: this report is on the first {read.count}"
    report.warnings = [scope, *warnings_of(report, read, maker.template)]
    return report


def _parted(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield rows in parts that fit in memory, whatever their length."""
    part: list[Row] = []
    size = 0
    for row in rows:
        part.append(row)
        size += sum(len(value) for value in row.values.values() if isinstance(value, (str, list)))
        if len(part) == ROWS or size >= CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def sampled_rows(rows: TokenDataset | Stream) -> TokenDataset:
    """Return rows that are in memory: all of a data set, or the first ones of a stream."""
    return rows.sample if isinstance(rows, Stream) else rows
