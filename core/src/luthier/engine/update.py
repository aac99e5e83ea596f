"""One optimizer step: forward, backward, clip, step, over every micro-batch of the global batch."""

from __future__ import annotations

import math
import time
from typing import Any

import attrs
import torch
from torch import Tensor

from luthier.engine.batch import Batch
from luthier.engine.evaluate import Meter, couples
from luthier.engine.seeds import seed_all
from luthier.engine.setup import Setup
from luthier.errors import LuthierError
from luthier.plugins.protocols import LossOutput, Progress


@attrs.frozen(kw_only=True)
class Update:
    """What one optimizer step did."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    documents: int
    seconds: float
    metrics: dict[str, tuple[float, float]]  # (sum, count)


def update(setup: Setup, index: int, rows: Any) -> Update:
    """Take step `index` (from 0) on the examples `rows`. Raises `train-nonfinite` before the weights are touched."""
    began = time.perf_counter()
    setup.optimizer.zero_grad(set_to_none=True)
    batches = list(setup.micro_batches(rows))
    meter = _accumulate_coupled(setup, index, batches) if couples(setup.loss) else _accumulate(setup, index, batches)
    loss = meter.loss + _penalty(setup)
    setup.adapter.gradients_ready()
    norm = _clip(setup)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise LuthierError("train-nonfinite", f"loss {loss}, gradient norm {norm} at step {index + 1}")
    rate = _apply(setup, index)
    return Update(
        loss=loss,
        grad_norm=norm,
        learning_rate=rate,
        tokens=sum(b.num_tokens for b in batches),
        supervised_tokens=sum(len(b.supervised) for b in batches),
        documents=sum(b.num_documents for b in batches),
        seconds=time.perf_counter() - began,
        metrics=meter.pairs(),
    )


def _accumulate(setup: Setup, index: int, batches: list[Batch]) -> Meter:
    """Backward over each micro-batch, every term divided by its weight in the whole global batch."""
    terms = [setup.step.terms(batch) for batch in batches]
    weights = _summed(terms)
    meter = Meter()
    for number, (batch, own) in enumerate(zip(batches, terms, strict=True)):
        seed_all(setup.recipe.seed, index, number)
        output = setup.step(batch)
        _backward(_objective(output, weights))
        meter.add(output, own)
    return meter


def _accumulate_coupled(setup: Setup, index: int, batches: list[Batch]) -> Meter:
    """Score all without gradient, differentiate `combine` by the scores, and replay each micro-batch with that."""
    weights = _summed([setup.step.terms(batch) for batch in batches])
    with torch.no_grad():
        scores = [_scored(setup, index, number, batch) for number, batch in enumerate(batches)]
    joined = torch.cat(scores).requires_grad_()
    output = setup.loss.combine(joined)
    (gradient,) = torch.autograd.grad(_objective(output, weights), joined)
    for number, (batch, share) in enumerate(zip(batches, gradient.split([len(s) for s in scores]), strict=True)):
        _scored(setup, index, number, batch).backward(share)
    meter = Meter()
    meter.add(output, weights)
    return meter


def _scored(setup: Setup, index: int, number: int, batch: Batch) -> Tensor:
    seed_all(setup.recipe.seed, index, number)
    return setup.step(batch, scores_only=True)


def _summed(terms: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(t.get(name, 0.0) for t in terms) for name in {n for t in terms for n in t}}


def _objective(output: LossOutput, weights: dict[str, float]) -> Tensor | None:
    unknown = sorted(output.sums.keys() - weights.keys())
    if unknown:
        remedy = "Let terms(batch) give each of them its weight."
        raise LuthierError("part-invalid", "its sums have no weight", where="loss", found=unknown, remedy=remedy)
    vectors = {name: tuple(value.shape) for name, value in output.sums.items() if value.dim()}
    if vectors:
        remedy = "Sum over the tokens; the engine divides by the weights."
        raise LuthierError("part-invalid", "its sums are not scalars", where="loss", found=vectors, remedy=remedy)
    shares = [value / weights[name] for name, value in output.sums.items() if weights[name]]
    return sum(shares[1:], shares[0]) if shares else None


def _backward(objective: Tensor | None) -> None:
    if objective is not None and objective.requires_grad:
        objective.backward()


def _penalty(setup: Setup) -> float:
    penalty = setup.adapter.penalty()
    if penalty is None:
        return 0.0
    penalty.backward()
    return float(penalty.detach())


def _clip(setup: Setup) -> float:
    """The gradient norm over all parameters, before it is clipped."""
    gradients = [p.grad for g in setup.optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    limit = setup.recipe.max_grad_norm
    if limit is not None and math.isfinite(float(norm)):
        scale = limit / (norm + 1e-6)  # as torch's clip_grad_norm_
        if float(scale) < 1.0:
            torch._foreach_mul_(gradients, scale)
    return float(norm)


def _apply(setup: Setup, index: int) -> float:
    """Set this step's rates, step, and tell the adapter; returns the learning rate."""
    total = len(setup.rates)
    done = Progress(step=index, total_steps=total, epoch=index / setup.order.steps_per_epoch)
    multipliers = setup.quantizer.progressed(done)
    rate = setup.rates[index] * multipliers.lr
    for group, decay in zip(setup.optimizer.param_groups, setup.decays, strict=True):
        group["lr"] = rate * group.get("lr_scale", 1.0)
        group["weight_decay"] = decay * multipliers.weight_decay
    setup.optimizer.step()
    setup.adapter.stepped(Progress(step=index + 1, total_steps=total, epoch=(index + 1) / setup.order.steps_per_epoch))
    return rate
