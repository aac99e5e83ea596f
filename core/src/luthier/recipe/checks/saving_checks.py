"""Checks of saving: settings of checkpoints and files that contradict each other, or that cannot be fulfilled."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.recipe.schema import Settings

SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)\s*", re.IGNORECASE)
UNITS: Final = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
OWN: Final = {"steps": "save_steps", "samples": "save_samples"}


def check_saving(recipe: Settings) -> None:
    """Raise `recipe-missing` if a strategy lacks its interval, and `recipe-conflict` if another strategy's is given."""
    shard_bytes(recipe.max_shard_size)
    strategy = recipe.save_strategy
    if strategy == "auto":
        return
    own = OWN.get(strategy)
    if own is not None and not getattr(recipe, own):
        raise LuthierError("recipe-missing", f"save_strategy {strategy} needs it", where=own)
    for kind, name in OWN.items():
        if name != own and getattr(recipe, name):
            problem, remedy = (
                f"save_strategy {strategy} does not read it",
                f"Leave it out, or write save_strategy: {kind}.",
            )
            raise LuthierError("recipe-conflict", problem, where=name, remedy=remedy)
    if strategy == "no" and recipe.load_best_model_at_end:
        problem, remedy = "save_strategy no keeps no checkpoint to go back to", "Leave out one of the two."
        raise LuthierError("recipe-conflict", problem, where="load_best_model_at_end", remedy=remedy)


def shard_bytes(text: str) -> int:
    """Return the bytes of a size such as `5GB` (decimal, as on the hub).

    Raises `recipe-out-of-range` for other text.
    """
    match = SIZE.fullmatch(text)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        remedy = "Write a number with KB, MB, GB or TB, such as 5GB."
        raise LuthierError("recipe-out-of-range", "not a file size", where="max_shard_size", found=text, remedy=remedy)
    return size
