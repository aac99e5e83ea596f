"""Checks of what a loss returns: sums with their weights, metrics with names of their own, scores of its units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.plugins.contracts.metric_names import check_metric_names
from luthier.plugins.contracts.values import LossOutput

if TYPE_CHECKING:
    from luthier.data.batches.batch import Batch

PENALTY: Final = "penalty"  # the metric of penalties of the weights; those of tokens are `penalty/<name>`
ROUTER: Final = "router_aux"  # the term and metric of the experts' load-balancing loss


def check_output(output: Any, source: str) -> LossOutput:
    """Return what `source` ("__call__", "combine") of a loss returned; raise `part-invalid` where it is not usable."""
    if not isinstance(output, LossOutput):
        problem, remedy = f"{source} did not return a LossOutput", "Return luthier.LossOutput(sums={name: scalar})."
        raise LuthierError("part-invalid", problem, where="loss", found=_described(output), remedy=remedy)
    numbers = {name: value for name, value in output.sums.items() if not isinstance(value, Tensor)}
    if numbers:
        remedy = "Return each sum as a scalar tensor that depends on the policy."
        raise LuthierError("part-invalid", "its sums are not tensors", where="loss", found=numbers, remedy=remedy)
    vectors = {name: tuple(value.shape) for name, value in output.sums.items() if value.dim()}
    if vectors:
        remedy = "Sum over the tokens; the engine divides by the weights."
        raise LuthierError("part-invalid", "its sums are not scalars", where="loss", found=vectors, remedy=remedy)
    if own := [name for name in output.sums if name == ROUTER or name.startswith(f"{PENALTY}/")]:
        problem = f"the term {own[0]!r} is the run's own"
        raise LuthierError("part-invalid", problem, where="loss", remedy="Give it another name.")
    check_metric_names(output.metrics, "loss")
    pairs = {n: _described(pair) for n, pair in output.metrics.items() if not _is_pair(pair)}
    if pairs:
        remedy = "Give each metric as (sum, count); the engine divides."
        raise LuthierError("part-invalid", "its metrics are not pairs", where="loss", found=pairs, remedy=remedy)
    return output


def check_terms(terms: Any) -> dict[str, float]:
    """Return what `terms` of a loss returned, as numbers; raise `part-invalid` where it is no mapping of numbers."""
    try:
        return {str(name): float(weight) for name, weight in terms.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError):
        remedy = "Return {name: weight}, a number for each sum."
        raise LuthierError("part-invalid", "terms(batch) did not return its weights", where="loss",
                           found=_described(terms), remedy=remedy) from None  # fmt: skip


def check_scores(returned: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the scores [U, ...] and fixed tensors [U, ...] that `scores` of a loss returned, the latter detached.

    Raises `part-invalid` where they are something else, or are not one row for each unit of the batch.
    """
    expected = "scores(policy, batch) returns (scores [U, ...], {name: fixed tensor [U, ...]})"
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], Mapping):
        raise LuthierError("part-invalid", expected, where="loss", found=_described(returned),
                           remedy="Return a pair; {} where nothing is fixed.")  # fmt: skip
    scores, fixed = returned
    for name, value in (("scores", scores), *fixed.items()):
        if not isinstance(value, Tensor) or not value.dim() or (not batch.idle and len(value) != batch.num_units):
            problem = f"{expected}, with U = {batch.num_units} here; {name!r} is something else"
            raise LuthierError("part-invalid", problem, where="loss", found=_described(value),
                               remedy="Give one row for each unit of the batch.")  # fmt: skip
    if torch.is_grad_enabled() and not batch.idle and not scores.requires_grad:
        raise LuthierError("part-invalid", "its scores do not depend on the policy", where="loss",
                           remedy="Compute them from what the policy gives, without detaching it.")  # fmt: skip
    return scores, {name: value.detach() for name, value in fixed.items()}


def weigh_output(output: LossOutput, weights: Mapping[str, float]) -> Tensor | None:
    """Return the objective: each sum over its weight in the global batch; None where nothing has a weight.

    Raises `part-invalid` where a sum has no weight of its name.
    """
    unknown = sorted(output.sums.keys() - weights.keys())
    if unknown:
        remedy = f"Let terms(batch) give each of them its weight; it gives {', '.join(sorted(weights)) or 'none'}."
        raise LuthierError("part-invalid", "its sums have no weight", where="loss", found=unknown, remedy=remedy)
    shares = [value / weights[name] for name, value in output.sums.items() if weights[name]]
    return sum(shares[1:], shares[0]) if shares else None


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _described(value: Any) -> Any:
    """Return a value as an error can show it: a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" if not isinstance(value, (int, float, str, type(None))) else value
