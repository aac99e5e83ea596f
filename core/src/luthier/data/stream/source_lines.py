"""Lines of a stream: the files of all sources without a share, read one after another, and those of each with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import attrs
import numpy as np

from luthier.data.batches.row_order import order_rows
from luthier.recipe.schema import Source

# the index of row r of unit u is u * FILE_ROWS + r, because the number of rows in a file is not known
FILE_ROWS: Final = 1 << 40


@attrs.frozen(order=True)
class Place:
    """A place in a line's epoch: the number of complete units in its order, rows read of the next, and passes done."""

    unit: int = 0
    row: int = 0
    times: int = 0


@attrs.frozen(kw_only=True)
class Line:
    """Units, by number, that are read one after another, in another order in each pass."""

    units: tuple[int, ...]
    sources: Mapping[int, int]  # the number of each unit's source
    share: float  # of the rows of an epoch; 1 if it is the only line
    passes: int | None = 1  # over its units in an epoch; None: as many as the share needs
    path: str = ""  # of the source, if it has a share

    def order(self, number: int, seed: int, epoch: int, times: int) -> list[int]:
        """Return the units of one pass. `number` is the line's own among all lines."""
        if number == 0 and times == 0:
            places = order_rows(len(self.units), seed, epoch)
        else:
            places = np.random.Generator(np.random.PCG64([seed, epoch, number, times])).permutation(len(self.units))
        return [self.units[place] for place in places.tolist()]

    def source_of(self, index: int) -> str:
        """Return the number, as text, of the source of the row with this index."""
        return str(self.sources[index // FILE_ROWS])


def make_lines(sources: Sequence[Source], counts: Sequence[int]) -> list[Line]:
    """Return the lines of sources that have so many units each, numbered in the order of the sources."""
    starts = np.cumsum([0, *counts]).tolist()
    own = [tuple(range(a, b)) for a, b in zip(starts, starts[1:], strict=False)]
    whole = [units * source.repeat for units, source in zip(own, sources, strict=True) if source.share is None]
    rest = 1 - sum(source.share or 0.0 for source in sources)
    of = {unit: number for number, units in enumerate(own) for unit in units}
    first = [Line(units=sum(whole, ()), sources=of, share=rest)] if whole else []
    return first + [
        Line(units=units, sources=of, share=source.share, passes=None if whole else source.repeat, path=source.path)
        for units, source in zip(own, sources, strict=True)
        if source.share is not None
    ]
