"""Evaluation: the loss over held-out rows, summed over tokens before it is divided."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from luthier.data.batches.batch import Batch
from luthier.data.batches.micro_batches import deal_batches
from luthier.data.examples import TokenDataset, TokenExample
from luthier.plugins.completion import has_default
from luthier.plugins.contracts.protocols import Loss
from luthier.plugins.contracts.values import LossOutput
from luthier.step.evaluation.answer_metrics import measure_answers
from luthier.step.evaluation.metric_parts import measuring_tokens, score_tokens
from luthier.step.losses.loss_output import ROUTER
from luthier.step.losses.meter import Meter
from luthier.step.out_of_memory import fit_memory
from luthier.step.setup import Setup


class Abandoned(Exception):
    """An evaluation was left before its end."""


def evaluate_loss(
    setup: Setup, dataset: TokenDataset | None = None, leave: Callable[[], bool] | None = None
) -> dict[str, float]:
    """Return `eval_loss` and what else the loss measures, with the optimizer's evaluation weights.

    `eval_perplexity` is that of the metric `nll`, else of the loss's main term (its first), where the loss declares
    that this is nats per token.
    Raises `Abandoned` on every rank before the next micro-batch once `leave` says so on one.
    """
    dataset = dataset if dataset is not None else setup.validation
    assert dataset is not None
    training = setup.model.training
    setup.tell_progress()
    setup.model.eval()
    try:
        with setup.optimizer_part.evaluating(), torch.no_grad():
            examples = setup.layout.lay_out_groups(dataset, setup.recipe.global_batch_size)
            lengths = setup.packing.sizes(examples)
            meter = fit_memory(setup, lengths, lambda: _measured(setup, examples, leave), agrees=False)
            answers = measure_answers(setup, dataset)
    finally:
        setup.model.train(training)
    metrics = {"eval_loss": meter.loss, **{f"eval_{name}": value for name, value in meter.read().items()}}
    concluded = {f"eval_{name}": scores.value for name, scores in answers.items()}
    metrics |= {name: value for name, value in concluded.items() if not math.isnan(value)}
    main = metrics.get("eval_nll", next((value for name, value in meter.terms().items() if name != ROUTER), None))
    if setup.has_perplexity and main is not None:
        metrics["eval_perplexity"] = math.exp(min(main, 700.0))
    return metrics


def evaluate_tuned(setup: Setup, leave: Callable[[], bool] | None = None) -> dict[str, float]:
    """Return the metrics of an evaluation, after which the quantizer has kept what its trials improved."""
    metrics = evaluate_loss(setup, leave=leave)
    if has_default(setup.quantizer, "quantizer", "tune"):
        return metrics
    return dict(setup.quantizer.tune(metrics, lambda: evaluate_loss(setup, leave=leave)))


def _measured(setup: Setup, examples: Sequence[TokenExample], leave: Callable[[], bool] | None) -> Meter:
    """Measure the rows: each rank takes its share of the micro-batches, and their sums are everyone's."""
    if is_coupled(setup.loss):
        return _measured_in_groups(setup, examples, leave)
    meter, compute = Meter(), measuring_tokens(setup)
    for batch in deal_batches(examples, setup.packing, setup.device, setup.recipe.max_eval_batches):
        if leave is not None and setup.world.any(leave()):
            raise Abandoned
        output = setup.step(batch, compute)
        if not batch.idle:
            meter.add(output, setup.step.terms(batch))
    return meter.over(setup.world)


def _measured_in_groups(setup: Setup, examples: Sequence[TokenExample], leave: Callable[[], bool] | None) -> Meter:
    """Score as many rows together as training does in one global batch; `max_eval_batches` ends after a whole group."""
    # imported here because that module also counts memory with a meter
    from luthier.step.losses.coupled import measure_group

    meter, size, seen, most = Meter(), setup.recipe.global_batch_size, 0, setup.recipe.max_eval_batches
    for first in range(0, len(examples), size):
        if most is not None and seen >= most:
            break
        group = [examples[i] for i in range(first, min(first + size, len(examples)))]
        batches = list(deal_batches(group, setup.packing, setup.device))
        if leave is not None and setup.world.any(leave()):
            raise Abandoned
        meter.include(measure_group(setup, batches))
        meter.include(_measure_tokens(setup, batches))
        seen += len(batches) * setup.world.size
    return meter


def _measure_tokens(setup: Setup, batches: list[Batch]) -> Meter:
    """Return the metrics over tokens from a pass of their own, if the loss scores a whole group at once."""
    meter = Meter()
    for batch in batches if any(metric.record.over == "tokens" for metric in setup.metrics.values()) else ():
        output = setup.step(
            batch, lambda policy, batch: LossOutput(sums={}, metrics=score_tokens(setup, policy, batch))
        )
        if not batch.idle:
            meter.add(output, {})
    return meter.over(setup.world)


def is_coupled(loss: Loss) -> bool:
    """Return True if a loss is a function of the whole global batch at once."""
    return getattr(loss, "couples", "nothing") == "batch"
