"""Sets: all rows of a set become examples, in as many processes as pay off, with progress and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import attrs
import numpy as np

from luthier.data.examples import TokenDataset
from luthier.data.formats.bad_rows import Fault, settle_faults
from luthier.data.formats.read_rows import ReadRows
from luthier.data.formats.remarks import warnings_of
from luthier.data.joining_set import JoiningSet
from luthier.data.line_rows import Part, make_part
from luthier.data.report import Report
from luthier.data.source_mix import mix_sources, weigh_sources
from luthier.data.tokenise.examples_of_rows import Made, Maker
from luthier.data.tokenise.token_blocks import Blocks
from luthier.data.tokenise.workers import Workers, count_processes, cut_chunks, working_processes
from luthier.errors import LuthierError

Progress = Callable[[int, int], None]  # called with rows done and rows in all


@attrs.define(kw_only=True)
class Making:
    """The making of all sets of a preparation."""

    maker: Maker
    total: int  # rows of all sets
    progress: Progress | None = None
    workers: Workers | None = None  # None: this process makes the examples
    done: int = 0

    def make(self, read: ReadRows, seed: int | None = None) -> tuple[TokenDataset, Report]:
        """Return the examples of rows that were read, and the report on them, as `settle` does."""
        return self.settle(read, self.made(cut_chunks(read.forms)), seed)

    def made(self, parts: Iterable[Part]) -> Iterator[Made]:
        """Yield what is made of each part, in order."""
        own = partial(make_part, self.maker)
        for made in map(own, parts) if self.workers is None else self.workers.made(parts):
            self.done += made.rows if made.read is None else made.read.count
            if self.progress is not None:
                self.progress(self.done, self.total)
            yield made

    def settle(self, read: ReadRows, parts: Iterable[Made], seed: int | None = None) -> tuple[TokenDataset, Report]:
        """Return the examples in all parts, and the report on the rows that they were made of.

        `read` has the rows of a part, at the latest, when the part comes.

        With a `seed` the sources are mixed as the recipe says; the seed decides what is drawn. Raises one error for all
        bad rows, as `bad_rows` says, and `data-empty` if no row is left.
        """
        report, faults = Report(), list[Fault]()
        documents = self._documents(parts, report, read, faults)
        report.format, report.rows = read.name, read.count
        faults += read.faults
        documents = weigh_sources(documents, read.parts)
        if seed is not None and (len(read.parts) > 1 or any(part.source.repeat > 1 for part in read.parts)):
            documents, report.sources = mix_sources(documents, read.parts, seed)
        examples = self._blocks(documents)
        report.measure(examples)
        faults.sort(key=lambda fault: fault.number)
        settle_faults(faults, read.count, self.maker.data)
        report.add_faults(faults)
        report.warnings = warnings_of(report, read, self.maker.template)
        if len(examples) == 0:
            dropped = ", ".join(f"{reason}: {count}" for reason, count in report.drops.items())
            raise LuthierError("data-empty", f"no row is left to train on; dropped: {dropped}", where="data")
        return examples, report

    def _documents(self, parts: Iterable[Made], report: Report, read: ReadRows, faults: list[Fault]) -> TokenDataset:
        documents, before = JoiningSet(), 0
        for made in parts:
            numbers = np.array(read.numbers[before : before + made.rows], np.int64)
            documents.add(made.examples.renumbered(numbers))
            report.drops.update(made.drops)
            report.changes.update(made.changes)
            report.unrendered.update(made.unrendered)
            faults += [attrs.evolve(fault, number=int(numbers[fault.number])) for fault in made.faults]
            before += made.rows
        return documents.whole()

    def _blocks(self, documents: TokenDataset) -> TokenDataset:
        """Return the documents, cut into blocks if the recipe asks for them."""
        if self.maker.data.block_size is None:
            return documents
        blocks = Blocks(size=self.maker.data.block_size)
        return TokenDataset.joined([blocks.add(documents), blocks.end()])


@contextmanager
def making_rows(maker: Maker, rows: int, progress: Progress | None = None) -> Iterator[Making]:
    """Yield the making of so many rows, with its processes."""
    count = count_processes(rows, maker.data.num_proc)
    if count == 1:
        yield Making(maker=maker, total=rows, progress=progress)
        return
    with working_processes(maker, count) as workers:
        yield Making(maker=maker, total=rows, progress=progress, workers=workers)
