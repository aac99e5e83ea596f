"""Bad rows: each one is kept as text with its place, so that all are reported at once, or dropped and counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

import attrs

from luthier.errors import LuthierError, show_value
from luthier.recipe.schema import Data

TOLD: Final = 10  # the most problems of rows that an error lists
PLACES: Final = 3  # the most places of further rows with the same problem
NUMBER: Final = re.compile(r"\d+")  # problems that differ in a number alone are the same
SURE: Final = 1000  # rows of a stream after which the share of bad rows is judged
KINDS: Final = {  # error codes that concern one row alone -> the word under which such rows are counted
    "data-row": "broken",
    "model-vocabulary": "broken",
    "data-column": "column",
    "data-avoided": "avoided",
    "data-unsupervised": "unsupervised",
    "data-unrendered": "unrendered",
    "template-unprovable": "unprovable",
}
EMPTY: Final = "empty"  # the kind of a row that holds nothing at all


@attrs.frozen(kw_only=True)
class Fault:
    """The problem of one row: an error as plain text, which can be sent from one process to another."""

    code: str
    kind: str
    where: str | None
    line: str  # the error's text, with place, problem and the value found
    remedy: str
    problem: str = ""
    found: str | None = None
    number: int = 0  # the number of the row among those read or made with it

    @classmethod
    def of(cls, error: LuthierError, kind: str = "", number: int = 0) -> Fault:
        """Return the fault that an error describes. An error that concerns more than a row is raised again."""
        if error.code not in KINDS:
            raise error
        value = None if error.found is None else show_value(error.found)
        return cls(
            code=error.code,
            kind=kind or KINDS[error.code],
            where=error.where,
            line=error.line,
            remedy=error.remedy,
            problem=error.problem,
            found=value,
            number=number,
        )


@attrs.frozen(repr=False)
class Found:
    """A value that was found, as text, because the value itself is in another process."""

    text: str

    def __repr__(self) -> str:
        return self.text


def count_faults(faults: Sequence[Fault]) -> Counter[str]:
    return Counter(fault.kind for fault in faults)


def faults_error(faults: Sequence[Fault], rows: int, ending: str = "") -> LuthierError:
    """Return one error for all bad rows: the first problems with their places, and the number of each kind.

    `ending` is a sentence that says why they are an error now. A single row gets the error that it has by itself. To
    drop the rows is advised only if some row of the `rows` would be left.
    """
    first = faults[0]
    is_left = not ending and len(faults) < rows
    alone = ", or data.unsupervised: drop for those alone" if first.kind == "unsupervised" else ""
    drop = f" Or set data.bad_rows: drop, which drops and counts them{alone}." if is_left else ""
    remedy = f"{first.remedy}{drop}"
    if len(faults) == 1 and not ending:
        value = None if first.found is None else Found(first.found)
        return LuthierError(first.code, first.problem, where=first.where, found=value, remedy=remedy)
    kinds = ", ".join(f"{count} {kind}" for kind, count in count_faults(faults).most_common())
    problem = f"{ending}{len(faults)} of {rows} rows are bad: {kinds}{_list_problems(faults)}"
    return LuthierError(first.code, problem, where=first.where, remedy=remedy)


def _list_problems(faults: Sequence[Fault]) -> str:
    """Return a line for each of the first problems, and below it the places of further rows that have the same one."""
    rows_of: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        rows_of.setdefault((fault.code, NUMBER.sub("0", fault.problem)), []).append(fault)
    lines = []
    for first, *others in list(rows_of.values())[:TOLD]:
        lines.append(f"  {first.line}")
        if others:
            places = ", ".join((fault.where or "?").partition(": ")[0] for fault in others[:PLACES])
            rows = "row" if len(others) == 1 else "rows"
            lines.append(f"    and {len(others):,} more {rows} like it: {places}{', ...' * (len(others) > PLACES)}")
    untold = sum(map(len, list(rows_of.values())[TOLD:]))
    return "".join(f"\n{line}" for line in [*lines, *([f"  and {untold:,} more"] if untold else ())])


def check_policy(data: Data) -> None:
    """Raise `recipe-conflict` for a limit that nothing reads, and `recipe-out-of-range` for an impossible one."""
    limit = data.max_bad_rows
    if limit is not None and data.bad_rows == "error":
        problem, remedy = "a limit is read with bad_rows: drop only", "Set bad_rows: drop, or leave max_bad_rows out."
        raise LuthierError("recipe-conflict", problem, where="data.max_bad_rows", found=limit, remedy=remedy)
    if isinstance(limit, float) and limit > 1:
        problem = "a whole number is a count of rows, and a share is from 0.0 to 1.0"
        raise LuthierError("recipe-out-of-range", problem, where="data.max_bad_rows", found=limit)


def settle_faults(faults: Sequence[Fault], rows: int, data: Data) -> None:
    """Raise one error for all bad rows, unless the recipe drops them and there are not too many."""
    fatal = [fault for fault in faults if _is_fatal(fault, data)]
    if fatal:
        raise faults_error(fatal, rows)
    if faults and exceeds_limit(len(faults), rows, data):
        reason = f"more than max_bad_rows: {data.max_bad_rows}: "
        raise faults_error(faults, rows, reason)


def _is_fatal(fault: Fault, data: Data) -> bool:
    own = data.unsupervised if fault.kind == "unsupervised" else None
    return (own or data.bad_rows) == "error"


def exceeds_limit(count: int, rows: int, data: Data) -> bool:
    """Return True if `count` bad rows among `rows` are more than the recipe allows."""
    limit = data.max_bad_rows
    if limit is None:
        return False
    return count > (limit * rows if isinstance(limit, float) else limit)
