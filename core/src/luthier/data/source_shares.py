"""Shares: how many rows of each source come in an epoch, if the recipe gives them shares, repeats or weighs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from luthier.errors import LuthierError
from luthier.recipe.schema import Source

WHOLE: Final = 1e-6  # tolerance for shares that must add up to 1


@attrs.frozen(kw_only=True)
class SourceRows:
    """The rows of one source among those of a set: numbers from `first` to before `end`."""

    source: Source
    first: int
    end: int


def is_mixed(sources: Sequence[Source]) -> bool:
    """Return True if a source comes with another number of rows than it has."""
    return any(source.share is not None or source.repeat != 1 for source in sources)


def are_plain(sources: Sequence[Source]) -> bool:
    """Return True if the rows of each source come once, and count as those of the others."""
    return not is_mixed(sources) and all(source.weight == 1.0 for source in sources)


def check_shares(sources: Sequence[Source]) -> None:
    """Raise, before any row is read, for shares that leave no room for others or do not fill the epoch."""
    shares = [source.share for source in sources if source.share is not None]
    if not shares:
        return
    total = sum(shares)
    if len(shares) == len(sources) and abs(total - 1) > WHOLE:
        problem, remedy = (
            "every source has a share, but together they are not 1",
            "Leave one out, which fills the rest.",
        )
        raise LuthierError("recipe-out-of-range", problem, where="data.train", found=total, remedy=remedy)
    if len(shares) < len(sources) and total > 1 - WHOLE:
        problem, remedy = "the shares leave no room for the sources that have none", "Lower them."
        raise LuthierError("recipe-out-of-range", problem, where="data.train", found=total, remedy=remedy)


def count_rows(sources: Sequence[Source], rows: Sequence[int]) -> list[int]:
    """Return how many rows of each source come in an epoch.

    A source without a share comes whole, `repeat` times, and the others relative to it. If all have a share, the epoch
    is the longest in which none comes more often than `repeat` times.
    """
    most = [count * source.repeat for count, source in zip(rows, sources, strict=True)]
    shares = [source.share for source in sources]
    if all(share is None for share in shares):
        return most
    rest = [count for count, share in zip(most, shares, strict=True) if share is None]
    given = [share or 0.0 for share in shares]
    if rest:
        total = sum(rest) / (1 - sum(given))
    else:
        total = min(count / share for count, share in zip(most, given, strict=True))
    counts = [count if share is None else round(share * total) for count, share in zip(most, shares, strict=True)]
    return [
        _at_least_one(count, source) if own else 0 for count, source, own in zip(counts, sources, rows, strict=True)
    ]


def _at_least_one(count: int, source: Source) -> int:
    if count:
        return count
    problem = "the share of this source is less than one row of an epoch"
    raise LuthierError("recipe-out-of-range", problem, where=source.path, found=source.share, remedy="Raise it.")
