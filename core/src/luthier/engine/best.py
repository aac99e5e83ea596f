"""The best checkpoint: which evaluation it goes by, and whether there is such a one, before any training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Final

from luthier.data.examples import TokenDataset
from luthier.engine.evaluate import evaluate
from luthier.errors import LuthierError, nearest

if TYPE_CHECKING:
    from luthier.engine.setup import Setup
    from luthier.recipe import Recipe

ALWAYS: Final = ("eval_loss", "eval_perplexity")
FIRST: Final = 8  # held-out rows that usually show what an evaluation measures


def check_metric(setup: Setup) -> None:
    """Raise `recipe-conflict` where no evaluation will give `metric_for_best_model`.

    Only the loss itself knows what it measures: for a name that every loss does not have, a few rows are evaluated,
    and all of them where those do not show it.
    """
    name, rows = setup.recipe.metric_for_best_model, setup.validation
    if name in ALWAYS or rows is None:
        return
    few = TokenDataset.of(list(islice(rows, FIRST)))
    if name not in evaluate(setup, few):
        require_metric(name, evaluate(setup))


def require_metric(name: str, found: Iterable[str]) -> None:
    if name not in found:
        problem, remedy = f"an evaluation gives no {name!r}", nearest(name, found)
        raise LuthierError("recipe-conflict", problem, where="metric_for_best_model", remedy=remedy)


def improves(recipe: Recipe, found: Mapping[str, float], best: float | None) -> bool:
    """Whether an evaluation is better than the best so far; NaN never is."""
    name, more = recipe.metric_for_best_model, recipe.greater_is_better
    require_metric(name, found)
    if more is None:
        more = "loss" not in name and "perplexity" not in name
    if math.isnan(found[name]):
        return False
    return best is None or (found[name] > best if more else found[name] < best)
