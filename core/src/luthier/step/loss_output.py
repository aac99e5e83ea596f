"""Checks of what a loss returns: a `LossOutput` of scalar sums, each with its weight, and metrics of its own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from luthier.errors import LuthierError
from luthier.plugins.metric_names import check_metric_names
from luthier.plugins.values import LossOutput

ROUTER = "router_aux"  # the term and metric of the experts' load-balancing loss


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
    if ROUTER in output.sums:
        problem = f"the term {ROUTER!r} is the run's own"
        raise LuthierError("part-invalid", problem, where="loss", remedy="Give it another name.")
    check_metric_names(output.metrics, "loss")
    pairs = {n: _described(pair) for n, pair in output.metrics.items() if not _is_pair(pair)}
    if pairs:
        remedy = "Give each metric as (sum, count); the engine divides."
        raise LuthierError("part-invalid", "its metrics are not pairs", where="loss", found=pairs, remedy=remedy)
    return output


def check_weights(output: LossOutput, weights: Mapping[str, float]) -> None:
    """Raise `part-invalid` where a sum has no weight of its name."""
    unknown = sorted(output.sums.keys() - weights.keys())
    if unknown:
        remedy = f"Let terms(batch) give each of them its weight; it gives {', '.join(sorted(weights)) or 'none'}."
        raise LuthierError("part-invalid", "its sums have no weight", where="loss", found=unknown, remedy=remedy)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _described(value: Any) -> Any:
    """Return a value as an error can show it: a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" if not isinstance(value, (int, float, str, type(None))) else value
