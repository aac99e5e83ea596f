"""Sets: all rows of a set become examples, in as many processes as pay off, with progress and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.examples import TokenDataset
from luthier.data.formats.bad_rows import Fault, settle_faults
from luthier.data.formats.forms import Form
from luthier.data.formats.read_rows import ReadRows
from luthier.data.formats.remarks import warnings_of
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
        """Return the examples of the rows, and the report on the rows.

        With a `seed` the sources are mixed as the recipe says; the seed decides what is drawn. Raises one error for all
        bad rows, as `bad_rows` says, and `data-empty` if no row is left.
        """
        report, faults = Report(format=read.name, rows=read.count), list(read.faults)
        documents = self._documents(read.forms, report, np.array(read.numbers, np.int64), faults)
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

    def _documents(
        self, forms: Sequence[Form], report: Report, numbers: NDArray[np.int64], faults: list[Fault]
    ) -> TokenDataset:
        parts, before = [], 0
        for made in self._made(forms):
            parts.append(made.examples.renumbered(numbers[before : before + made.rows]))
            report.drops.update(made.drops)
            report.changes.update(made.changes)
            report.unrendered.update(made.unrendered)
            faults += [attrs.evolve(f, number=int(numbers[before + f.number])) for f in made.faults]
            before += made.rows
            self._tell(made.rows)
        return TokenDataset.joined(parts or [TokenDataset.of(())])

    def _blocks(self, documents: TokenDataset) -> TokenDataset:
        """Return the documents, cut into blocks if the recipe asks for them."""
        if self.maker.data.block_size is None:
            return documents
        blocks = Blocks(size=self.maker.data.block_size)
        return TokenDataset.joined([blocks.add(documents), blocks.end()])

    def _made(self, forms: Sequence[Form]) -> Iterator[Made]:
        parts = cut_chunks(forms)
        return map(self.maker.make, parts) if self.workers is None else self.workers.made(parts)

    def _tell(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, self.total)


@contextmanager
def making_rows(maker: Maker, rows: int, progress: Progress | None = None) -> Iterator[Making]:
    """Yield the making of so many rows, with its processes."""
    count = count_processes(rows, maker.data.num_proc)
    if count == 1:
        yield Making(maker=maker, total=rows, progress=progress)
        return
    with working_processes(maker, count) as workers:
        yield Making(maker=maker, total=rows, progress=progress, workers=workers)
