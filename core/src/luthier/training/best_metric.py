"""Checks, before training, that evaluation reports the metrics that `metric_for_best_model` and the parts need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from luthier.data.examples import TokenDataset
from luthier.errors import LuthierError, suggest_nearest
from luthier.step.evaluation.evaluate import evaluate_loss

if TYPE_CHECKING:
    from luthier.recipe import Recipe
    from luthier.step.setup import Setup

ALWAYS: Final = "eval_loss"
FIRST: Final = 8  # the number of held-out rows that usually show what an evaluation measures


def check_metrics(setup: Setup, callbacks: Mapping[str, Any]) -> None:
    """Raise `recipe-conflict` where evaluation reports no `metric_for_best_model`, or not what a part reads.

    Only the loss itself knows what it measures: for a name that every loss does not have, a few rows are evaluated,
    and all of them where those do not show it.
    """
    _check_tuning(setup)
    needed = {"metric_for_best_model": setup.recipe.metric_for_best_model} if setup.validation is not None else {}
    for name, part in {**callbacks, "quantizer": setup.quantizer, "adapter": setup.adapter}.items():
        needed |= {f"{name}.{option}": metric for option, metric in getattr(part, "needs_metrics", {}).items()}
    if needed and setup.validation is None:
        raise LuthierError("recipe-conflict", "there are no validation rows", where=next(iter(needed)),
                           remedy="Set data.validation, or leave this out.")  # fmt: skip
    if set(needed.values()) <= {ALWAYS, *(("eval_perplexity",) if setup.has_perplexity else ())}:
        return
    metrics = evaluate_loss(setup, TokenDataset.of(list(islice(setup.validation or (), FIRST))))
    if not set(needed.values()) <= metrics.keys():
        metrics = evaluate_loss(setup)
    for where, name in needed.items():
        require_metric(name, metrics, where)


def _check_tuning(setup: Setup) -> None:
    """Raise `recipe-conflict` if a quantizer tunes layers that the adapter does not write."""
    if setup.quantizer.needs_metrics and setup.adapter.artifact != "model":
        where = f"quantizer.{next(iter(setup.quantizer.needs_metrics))}"
        problem = "what the quantizer keeps is written with the whole model, and this adapter writes only itself"
        raise LuthierError("recipe-conflict", problem, where=where, remedy="Use adapter full, or leave this out.")


def require_metric(name: str, names: Iterable[str], where: str = "metric_for_best_model") -> None:
    if name not in names:
        problem, remedy = f"an evaluation gives no {name!r}", suggest_nearest(name, names)
        raise LuthierError("recipe-conflict", problem, where=where, remedy=remedy)


def improves_metric(recipe: Recipe, metrics: Mapping[str, float], best: float | None) -> bool:
    """Return True if an evaluation is better than the best so far; NaN never is."""
    name = recipe.metric_for_best_model
    require_metric(name, metrics)
    more = more_is_better(recipe, name)
    if math.isnan(metrics[name]):
        return False
    return best is None or (metrics[name] > best if more else metrics[name] < best)


def more_is_better(recipe: Recipe, name: str) -> bool:
    """Return True where more of a number is better: as the recipe says of its own, else of all but losses."""
    if name == recipe.metric_for_best_model and recipe.greater_is_better is not None:
        return recipe.greater_is_better
    return "loss" not in name and "perplexity" not in name
