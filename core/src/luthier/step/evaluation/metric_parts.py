"""Metric parts in an evaluation: built once, and given the tokens of each micro-batch in the pass of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from luthier.data.formats.message_roles import named_roles
from luthier.errors import LuthierError
from luthier.plugins.contracts.metric_names import check_metric_names
from luthier.plugins.contracts.values import LossOutput, TokenStatistics
from luthier.plugins.records import TOKEN_STATISTICS
from luthier.step.evaluation.built_metric import BuiltMetric

if TYPE_CHECKING:
    from luthier.data.batches.batch import Batch
    from luthier.plugins.contracts.policy_protocol import Policy
    from luthier.recipe.parts import Part, Resolved
    from luthier.step.setup import Setup


def settle_evaluation(setup: Setup, resolved: Resolved) -> None:
    """Set what an evaluation reports besides the loss: the perplexity, where its record says so, and metric parts."""
    setup.has_perplexity = bool(getattr(resolved.loss.record or resolved.loss.local, "perplexity", False))
    setup.metrics = build_metrics(resolved, sharded=setup.spread.strategy == "fsdp")
    over_answers = [name for name, metric in setup.metrics.items() if metric.record.over == "answers"]
    if over_answers and named_roles(setup.recipe.data.train_on):
        problem = "a metric over answers compares with what is supervised, and train_on names other roles"
        remedy = "Leave the metric out, or set data.train_on: assistant."
        raise LuthierError("recipe-conflict", problem, where="metrics", found=over_answers[0], remedy=remedy)


def build_metrics(resolved: Resolved, *, sharded: bool = False) -> dict[str, BuiltMetric]:
    """Return the recipe's metrics by the names that an evaluation reports them under (`eval_` before them).

    Raises where two have one name, or one is the run's own; and for answers where the weights are `sharded`.
    """
    built: dict[str, BuiltMetric] = {}
    for i, part in enumerate(resolved.metrics):
        where = f"metrics.{i}"
        name = _metric_name(part)
        record: Any = part.record or part.local
        check_metric_names([name], where)
        if name in built:
            raise LuthierError("recipe-conflict", "this metric is named twice", where=where, found=name)
        _check_metric(record, where)
        if record.over == "answers" and sharded:
            problem = "a metric over answers generates, which sharded weights cannot"
            raise LuthierError("part-unsupported", problem, where=where, remedy="Set distributed.strategy: ddp.")
        built[name] = BuiltMetric(name=name, record=record, part=resolved.build(part))
    return built


def _metric_name(part: Part) -> str:
    """Return the record's name; of an object of the caller its attribute `name`, or its class's name."""
    return part.name if part.local is None else str(getattr(part.local, "name", type(part.local).__name__))


def _check_metric(record: Any, where: str) -> None:
    """Raise `part-invalid` for an object of the caller that says of itself what no record could."""
    if record.over not in ("answers", "tokens"):
        raise LuthierError("part-invalid", "over is 'answers' or 'tokens'", where=where, found=record.over)
    if set(record.wants) - set(TOKEN_STATISTICS) or (record.wants and record.over != "tokens"):
        problem = "wants may name only 'entropy' and 'top1', in metrics over tokens"
        raise LuthierError("part-invalid", problem, where=where, found=list(record.wants))


def measuring_tokens(setup: Setup) -> Callable[[Any, Batch], LossOutput] | None:
    """Return what `Step` computes so that the metrics over tokens come with the loss; None where there are none."""
    if not any(metric.record.over == "tokens" for metric in setup.metrics.values()):
        return None

    def compute(policy: Any, batch: Batch) -> LossOutput:
        output, token_metrics = setup.step.compute_loss(policy, batch), score_tokens(setup, policy, batch)
        taken = sorted(token_metrics.keys() & output.metrics.keys())
        if taken:
            remedy = "Leave it out of metrics: the loss reports it."
            raise LuthierError("recipe-conflict", "the loss has a metric of this name", where="metrics",
                               found=taken[0], remedy=remedy)  # fmt: skip
        return dataclasses.replace(output, metrics={**output.metrics, **token_metrics})

    return compute


def score_tokens(setup: Setup, policy: Policy, batch: Batch) -> dict[str, tuple[float, float]]:
    """Return each metric's (sum, count) over the supervised tokens of a micro-batch."""
    metrics = {name: metric for name, metric in setup.metrics.items() if metric.record.over == "tokens"}
    want = sorted({name for metric in metrics.values() for name in metric.record.wants})
    scores = policy.token_logprobs(batch, want)  # called on every rank for every batch, idle ones too
    logprobs, also = scores if want else (scores, {})
    if not len(batch.supervised):
        return {}
    places = batch.supervised
    given = {name: values.detach()[places] for name, values in also.items()}
    statistics = TokenStatistics(
        labels=batch.labels[places],
        logprobs=logprobs.detach()[places],
        weights=batch.token_weights[places],
        entropy=given.get("entropy"),
        top1=given.get("top1"),
    )
    return {name: metric.score_tokens(statistics) for name, metric in metrics.items()}
