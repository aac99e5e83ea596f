"""Ranks and scales of single layers, chosen as in PEFT: the first pattern that matches the end of a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from luthier import Context, LuthierError

from luthier_lora.options import LowRank
from luthier_lora.targets import Targets, unmatched


def choose_by_pattern(pattern: Mapping[str, int], name: str, otherwise: int) -> int:
    """Return the value of the first pattern that matches the name of a layer, or `otherwise`."""
    end = find_pattern(pattern, name)
    return otherwise if end is None else pattern[end]


def find_pattern(pattern: Iterable[str], name: str) -> str | None:
    """Return the first regular expression that matches a name from its beginning or a dot to its end, or None."""
    return next((end for end in pattern if _fits(end, name)), None)


def rank_and_alpha(options: LowRank, name: str) -> tuple[int, int]:
    """Return the rank and lora_alpha of a layer."""
    rank = choose_by_pattern(options.rank_pattern, name, options.r)
    return rank, choose_by_pattern(options.alpha_pattern, name, options.lora_alpha)


def check_patterns(options: LowRank, targets: Targets) -> None:
    """Raise `model-target` for a pattern that matches no adapted layer, `recipe-wrong-type` for an invalid one."""
    for where in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(options, where):
            try:
                fits = any(_fits(pattern, name) for name in targets.modules)
            except re.error as error:
                problem = f"not a regular expression: {error}"
                raise LuthierError("recipe-wrong-type", problem, where=where, found=pattern) from None
            if not fits:
                raise unmatched(where, pattern, targets.modules, "matches no adapted layer")


def check_ranks(options: LowRank, sizes: Mapping[str, tuple[int, int]], context: Context, option: str) -> None:
    """Raise `recipe-out-of-range` before training if no layer that a rank is for can have it.

    `sizes` has (in, out) of each layer, and `option` is the name under which the user gives the rank. Single layers may
    be smaller than r, and a finished adapter is opened anyway.
    """
    if context.purpose == "open":
        return
    by_pattern: dict[str | None, list[str]] = {}
    for name in sizes:
        by_pattern.setdefault(find_pattern(options.rank_pattern, name), []).append(name)
    for end, names in by_pattern.items():
        rank = options.r if end is None else options.rank_pattern[end]
        most, widest = max((min(sizes[name]), name) for name in names)
        if rank > most:
            problem = f"no layer can have this rank: the widest, {widest}, is {list(sizes[widest])}"
            where = option if end is None else f"rank_pattern.{end}"
            wins = f" An {option} that is given wins over the preset's." if end is None and options.preset else ""
            remedy = f"At most {most} is possible.{wins}"
            raise LuthierError("recipe-out-of-range", problem, where=where, found=rank, remedy=remedy)


def _fits(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
