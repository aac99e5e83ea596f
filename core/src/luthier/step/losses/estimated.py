"""Gradients that an optimizer estimates from values of the objective, without backward."""

from __future__ import annotations

import torch

from luthier.data.batches.batch import Batch
from luthier.model.weights.shard_tensors import whole_tensor
from luthier.plugins.completion import has_default
from luthier.randomness import number_of, seed_all
from luthier.step.evaluation.evaluate import is_coupled
from luthier.step.losses.coupled import list_terms, measure_group
from luthier.step.losses.meter import Meter
from luthier.step.out_of_memory import agree_memory
from luthier.step.setup import Setup
from luthier.step.start_weights import sum_penalties


def estimates_gradients(setup: Setup) -> bool:
    """Return True if the optimizer estimates the gradients itself, so that backward is not run."""
    return not has_default(setup.optimizer_part, "optimizer", "estimate_gradients")


def estimate_gradients(setup: Setup, index: int, batches: list[Batch]) -> Meter:
    """Let the optimizer fill the gradients of step `index` (from 0).

    Returns the sums of the global batch at the weights as they are.
    """

    def objective() -> float:
        penalty = sum_penalties(setup.adapter, setup.penalties)
        return _measured(setup, index, batches).loss + (0.0 if penalty is None else float(whole_tensor(penalty)))

    with torch.no_grad():
        meter = _measured(setup, index, batches)
        setup.optimizer_part.estimate_gradients(objective, number_of(setup.recipe.seed, index, "estimate") % 2**63)
    return meter


def _measured(setup: Setup, index: int, batches: list[Batch]) -> Meter:
    """Return the sums of the global batch, with the random numbers of step `index`; without gradient."""
    if is_coupled(setup.loss):
        return measure_group(setup, batches, index)
    meter = Meter()
    for number, (batch, own) in enumerate(zip(batches, list_terms(setup, batches), strict=True)):
        seed_all(setup.recipe.seed, index, setup.spread.number(number))
        with setup.phases("forward"):
            output = setup.spread.module(batch)
        if not batch.idle:
            meter.add(output, own)
    agree_memory(setup, last=False)
    return meter.over(setup.world)
