"""Scores of the loss: what each held-out unit adds to the loss's terms and metrics, from a pass of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from luthier.data.batches.micro_batches import rank_batches
from luthier.step.evaluation.evaluate import is_coupled
from luthier.step.evaluation.metric_parts import measuring_tokens
from luthier.step.evaluation.scores import Scores
from luthier.step.losses.loss_output import ROUTER
from luthier.step.losses.meter import Meter

if TYPE_CHECKING:
    from luthier.data.examples import TokenDataset
    from luthier.step.setup import Setup

Pairs = dict[str, tuple[float, float]]  # (sum, weight) by name


def score_units(setup: Setup, dataset: TokenDataset) -> dict[str, Scores]:
    """Return the scores of the loss, its metrics and the perplexity; nothing for a loss that couples the batch.

    The numbers are those of an evaluation: sums over units, divided by weights over units.
    """
    if is_coupled(setup.loss):
        return {}
    terms: list[Pairs] = []
    metrics: list[Pairs] = []
    compute, training = measuring_tokens(setup), setup.model.training
    setup.tell_progress()
    setup.model.eval()
    try:
        with setup.optimizer_part.evaluating(), torch.no_grad():
            for unit in setup.layout.lay_out_groups(dataset, setup.recipe.global_batch_size):
                meter = Meter()
                for batch in rank_batches([unit], setup.packing, setup.device):
                    meter.add(setup.step(batch, compute), setup.step.terms(batch))
                terms.append(meter.shares())
                metrics.append(meter.pairs())
    finally:
        setup.model.train(training)
    return _scores(terms, metrics, has_perplexity=setup.has_perplexity)


def _scores(terms: Sequence[Pairs], metrics: Sequence[Pairs], *, has_perplexity: bool) -> dict[str, Scores]:
    names = list(dict.fromkeys(name for own in terms for name in own))
    rows = np.concatenate([_rows(terms, name) for name in names], 1)
    scores = {"loss": Scores(rows=rows, conclude=add_terms)}
    measured = dict.fromkeys(name for own in metrics for name in own)
    main = next((name for name in names if name != ROUTER), None)
    if has_perplexity and main is not None:
        nats = _rows(metrics, "nll") if "nll" in measured else _rows(terms, main)
        scores["perplexity"] = Scores(rows=nats, conclude=exponentiate_mean)
    return scores | {name: Scores(rows=_rows(metrics, name)) for name in measured}


def _rows(units: Sequence[Pairs], name: str) -> np.ndarray:
    return np.array([own.get(name, (0.0, 0.0)) for own in units], np.float64)


def add_terms(totals: Sequence[float]) -> float:
    """Return the objective of [sum, weight, sum, weight, ...]: each term's sum over its weight."""
    pairs = zip(totals[::2], totals[1::2], strict=True)
    shares = [total / weight for total, weight in pairs if weight]
    return functools.reduce(float.__add__, shares) if shares else math.nan


def exponentiate_mean(totals: Sequence[float]) -> float:
    """Return the perplexity of (nats, tokens)."""
    return math.exp(min(totals[0] / totals[1], 700.0)) if totals[1] else math.nan
