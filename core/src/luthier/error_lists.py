"""Several errors of one input, told together: the first with the others behind it, and a count of those beyond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from luthier.errors import LuthierError

TOLD: Final = 60  # the most errors of one input that are reported at once


def join_errors(errors: Sequence[LuthierError]) -> LuthierError:
    """Return one error that holds all of these, in their order. There must be at least one."""
    flat = flatten_errors(errors)
    first, also = flat[0], [error for error in flat[1:TOLD] if error.stands_for == 1]
    untold = sum(error.stands_for for error in flat) - 1 - len(also)
    if untold:
        more = LuthierError(first.code, f"and {untold:,} more", remedy="Correct these first.")
        more.stands_for = untold
        also.append(more)
    return LuthierError(first.code, first.problem, where=first.where, found=first.found, remedy=first.remedy,
                        also=also)  # fmt: skip


def flatten_errors(errors: Sequence[LuthierError]) -> list[LuthierError]:
    """These errors and those told with them, each alone, in their order."""
    return [_alone(single) for error in errors for single in (error, *error.also)]


def _alone(error: LuthierError) -> LuthierError:
    if not error.also:
        return error
    return LuthierError(error.code, error.problem, where=error.where, found=error.found, remedy=error.remedy)
