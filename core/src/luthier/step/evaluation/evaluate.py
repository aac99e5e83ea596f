"""Evaluation: the loss over held-out rows, summed over tokens before it is divided."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from luthier.data.batches.batch import Batch
from luthier.data.examples import TokenDataset, TokenExample
from luthier.distributed.world import World
from luthier.plugins.contracts.values import LossOutput
from luthier.step.evaluation.answer_metrics import measure_answers
from luthier.step.evaluation.metric_parts import measuring_tokens, score_tokens
from luthier.step.losses.loss_output import ROUTER
from luthier.step.out_of_memory import fitted
from luthier.step.setup import Setup, dealt


class Abandoned(Exception):
    """An evaluation was left before its end."""


class Meter:
    """Sums and weights over micro-batches; divided only when read."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.weights: dict[str, float] = defaultdict(float)
        self.metrics: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, output: LossOutput, terms: dict[str, float]) -> None:
        self._count(output.sums, terms, output.metrics)

    def over(self, world: World) -> Meter:
        """The sums over all ranks of the world."""
        if world.size == 1:
            return self
        total = Meter()
        for sums, weights, metrics in world.gather([self.sums, self.weights, self.metrics]):
            total._count(sums, weights, metrics)
        return total

    def include(self, other: Meter) -> None:
        """Count what another meter has counted."""
        self._count(other.sums, other.weights, other.metrics)

    def _count(self, sums: dict[str, Any], weights: dict[str, Any], metrics: dict[str, Any]) -> None:
        for held, given in ((self.sums, sums), (self.weights, weights)):
            for name, value in given.items():
                held[name] += _number(value)
        for name, (total, count) in metrics.items():
            self.metrics[name][0] += _number(total)
            self.metrics[name][1] += _number(count)

    @property
    def loss(self) -> float:
        """The objective: each term's sum over its weight."""
        return sum(self.terms().values())

    def terms(self) -> dict[str, float]:
        """Each term of the objective."""
        return {name: value / self.weights[name] for name, value in self.sums.items() if self.weights[name]}

    def shares(self) -> dict[str, tuple[float, float]]:
        """Return each term's (sum, weight)."""
        return {name: (value, self.weights[name]) for name, value in self.sums.items()}

    def pairs(self) -> dict[str, tuple[float, float]]:
        """Each metric's (sum, count)."""
        return {name: (total, count) for name, (total, count) in self.metrics.items()}

    def read(self) -> dict[str, float]:
        return divided([self.pairs()])


def divided(parts: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Terms or metrics over several steps or batches: sums added, counts added, then divided."""
    names = dict.fromkeys(name for part in parts for name in part)
    sums = {n: [sum(part[n][i] for part in parts if n in part) for i in (0, 1)] for n in names}
    return {name: total / count for name, (total, count) in sums.items() if count}


def evaluate(
    setup: Setup, dataset: TokenDataset | None = None, leave: Callable[[], bool] | None = None
) -> dict[str, float]:
    """`eval_loss` and what else the loss measures, with the optimizer's evaluation weights.

    `eval_perplexity` is that of the loss's main term (its first), where the loss declares that it is nats per token.
    Raises `Abandoned` on every rank before the next micro-batch once `leave` says so on one.
    """
    dataset = dataset if dataset is not None else setup.validation
    assert dataset is not None
    training = setup.model.training
    setup.tell_progress()
    setup.model.eval()
    try:
        with setup.optimizer_part.evaluating(), torch.no_grad():
            examples = setup.layout.lay_out_groups(dataset, int(setup.recipe.global_batch_size))
            lengths = setup.packing.sizes(examples)
            meter = fitted(setup, lengths, lambda: _measured(setup, examples, leave), agrees=False)
            meter.metrics.update(measure_answers(setup, dataset))
    finally:
        setup.model.train(training)
    found = {"eval_loss": meter.loss, **{f"eval_{name}": value for name, value in meter.read().items()}}
    main = next((value for name, value in meter.terms().items() if name != ROUTER), None)
    if setup.has_perplexity and main is not None:
        found["eval_perplexity"] = math.exp(min(main, 700.0))
    return found


def _measured(setup: Setup, examples: Sequence[TokenExample], leave: Callable[[], bool] | None) -> Meter:
    """Each rank takes its share of the micro-batches; their sums are everyone's."""
    if couples(setup.loss):
        return _measured_in_groups(setup, examples, leave)
    meter, compute = Meter(), measuring_tokens(setup)
    for batch in dealt(examples, setup.packing, setup.device, setup.recipe.max_eval_batches):
        if leave is not None and setup.world.any(leave()):
            raise Abandoned
        output = setup.step(batch, compute)
        if not batch.idle:
            meter.add(output, setup.step.terms(batch))
    return meter.over(setup.world)


def _measured_in_groups(setup: Setup, examples: Sequence[TokenExample], leave: Callable[[], bool] | None) -> Meter:
    """Score as many rows together as training does in one global batch; `max_eval_batches` ends after a whole group."""
    from luthier.step.losses.coupled import measure_group  # which counts with a meter, too

    meter, size, seen, most = Meter(), setup.recipe.global_batch_size, 0, setup.recipe.max_eval_batches
    for first in range(0, len(examples), size):
        if most is not None and seen >= most:
            break
        group = [examples[i] for i in range(first, min(first + size, len(examples)))]
        batches = list(dealt(group, setup.packing, setup.device))
        if leave is not None and setup.world.any(leave()):
            raise Abandoned
        meter.include(measure_group(setup, batches))
        meter.include(_measure_tokens(setup, batches))
        seen += len(batches) * setup.world.size
    return meter


def _measure_tokens(setup: Setup, batches: list[Batch]) -> Meter:
    """The metrics over tokens where the loss scores a whole group at once: in a pass of their own."""
    meter = Meter()
    for batch in batches if any(metric.record.over == "tokens" for metric in setup.metrics.values()) else ():
        output = setup.step(
            batch, lambda policy, batch: LossOutput(sums={}, metrics=score_tokens(setup, policy, batch))
        )
        if not batch.idle:
            meter.add(output, {})
    return meter.over(setup.world)


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def couples(loss: Any) -> bool:
    """Whether a loss is a function of the whole global batch at once."""
    return getattr(loss, "couples", "nothing") == "batch"
