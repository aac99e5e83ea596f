"""Losses that couple the global batch: scored without gradient, combined, and replayed with the scores' gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.data.batches.batch import Batch
from luthier.distributed.world import add_numbers
from luthier.errors import LuthierError
from luthier.plugins.contracts.values import LossOutput
from luthier.randomness import seed_all
from luthier.step.losses.loss_output import check_output, weigh_output
from luthier.step.losses.meter import Meter
from luthier.step.out_of_memory import agree_memory
from luthier.step.setup import Setup

Scored = tuple[Tensor, dict[str, Tensor], LossOutput]  # scores, fixed tensors, the run's own terms


def accumulate_coupled(setup: Setup, index: int, batches: list[Batch]) -> Meter:
    """Add the gradient of step `index` (from 0) to the parameters, and return the sums of the global batch."""
    weights = setup.world.sum_numbers(add_numbers(list_terms(setup, batches)))
    with torch.no_grad():
        scored = [_score(setup, index, number, batch) for number, batch in enumerate(batches)]
    agree_memory(setup, last=False)
    places, scores, fixed = join_scores(setup, batches, scored)
    seed_all(setup.recipe.seed, index)  # so that random numbers in `combine` are the same on every rank
    output = check_output(setup.loss.combine(scores.requires_grad_(), fixed), "combine")
    gradient = _differentiate_scores(output, weights, scores)
    routers = Meter()
    for number, (batch, place) in enumerate(zip(batches, places, strict=True)):
        with setup.spread.turn(last=number + 1 == len(batches)):
            again, _, router = _score(setup, index, number, batch)
            if number + 1 == len(batches):
                agree_memory(setup, last=True)
            with setup.phases("backward"):
                share = (again * (0.0 if batch.idle else gradient[place])).sum()
                balance = weigh_output(router, weights)
                setup.spread.backward(setup.precision.scaled(share if balance is None else share + balance), batch)
        if not batch.idle:
            routers.add(router, {})
    meter = routers.over(setup.world)
    meter.add(output, weights)
    return meter


def measure_group(setup: Setup, batches: Sequence[Batch], index: int | None = None) -> Meter:
    """Return the sums and weights of the rows that `batches` hold over all ranks, scored together, without gradient.

    The random numbers are those of step `index` (from 0); None: in an evaluation, which draws none.
    """
    if index is None:
        scored = [setup.step(batch, setup.step.compute_scores) for batch in batches]
    else:
        scored = [_score(setup, index, number, batch) for number, batch in enumerate(batches)]
        agree_memory(setup, last=False)
        seed_all(setup.recipe.seed, index)
    own = Meter()
    for batch, terms, (_, _, router) in zip(batches, list_terms(setup, batches), scored, strict=True):
        if not batch.idle:
            own.add(router, terms)
    meter = own.over(setup.world)
    _, scores, fixed = join_scores(setup, batches, scored)
    meter.add(check_output(setup.loss.combine(scores, fixed), "combine"), {})
    return meter


def list_terms(setup: Setup, batches: Sequence[Batch]) -> list[dict[str, float]]:
    """Return each micro-batch's share of the denominators; an idle one has none."""
    return [{} if batch.idle else setup.step.terms(batch) for batch in batches]


def join_scores(
    setup: Setup, batches: Sequence[Batch], scored: Sequence[Scored]
) -> tuple[list[slice], Tensor, dict[str, Tensor]]:
    """Return the scores and fixed tensors of all units over all ranks, and where each micro-batch's scores stand."""
    places, scores = setup.spread.join_rows([_rows(s, b) for b, (s, _, _) in zip(batches, scored, strict=True)])
    names = dict.fromkeys(name for _, fixed, _ in scored for name in fixed)
    joined = {}
    for name in names:
        own = [_rows(fixed.get(name, s), batch) for batch, (s, fixed, _) in zip(batches, scored, strict=True)]
        joined[name] = setup.spread.join_rows(own)[1]
    return places, scores, joined


def _score(setup: Setup, index: int, number: int, batch: Batch) -> Scored:
    seed_all(setup.recipe.seed, index, setup.spread.number(number))
    with setup.phases("forward"):
        return setup.spread.module(batch, setup.step.compute_scores)


def _rows(values: Tensor, batch: Batch) -> Tensor:
    return values.detach()[:0] if batch.idle else values.detach()


def _differentiate_scores(output: LossOutput, weights: dict[str, float], scores: Tensor) -> Any:
    """Return d objective / d scores; zeros where no term has a weight."""
    objective = weigh_output(output, weights)
    if objective is None:
        return torch.zeros_like(scores)
    if not objective.requires_grad:
        raise LuthierError("part-invalid", "combine's sums do not depend on the scores", where="loss",
                           remedy="Compute them from `scores`, without detaching it.")  # fmt: skip
    (gradient,) = torch.autograd.grad(objective, scores, allow_unused=True)
    return torch.zeros_like(scores) if gradient is None else gradient
