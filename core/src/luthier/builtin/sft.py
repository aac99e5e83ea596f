"""Supervised fine-tuning: next-token cross-entropy over the supervised tokens, each weighted by its example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.builtin import Sft
from luthier.data.batches.batch import Batch
from luthier.plugins.contracts.values import LossOutput


def build_supervised_loss(options: Sft) -> SupervisedLoss | ShapedLoss:
    """Return the plain loss where nothing shapes it: the head is then differentiated with known coefficients."""
    return SupervisedLoss(options) if options == Sft() else ShapedLoss(options)


class SupervisedLoss:
    """sum over t of w_t * -log p(label_t), over the sum of w_t."""

    data = "tokens"

    def __init__(self, options: Sft) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"sft": float(batch.token_weights[batch.supervised].sum(dtype=torch.float64))}

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        logprobs, also = policy.token_logprobs(batch, want=("top1",))
        total = -(logprobs * batch.token_weights).sum()
        hits = (also["top1"] * batch.token_weights).sum()
        weight = self.terms(batch)["sft"]
        return LossOutput(sums={"sft": total}, metrics={"accuracy": (hits, weight)})

    def coefficients(self, batch: Batch) -> Tensor:
        """Return [T], d total / d log-probability."""
        counted = torch.zeros_like(batch.token_weights)
        counted[batch.supervised] = -batch.token_weights[batch.supervised]
        return counted


class ShapedLoss:
    """The cost per supervised token is -(1 - s) log p(label) - s mean(log p) + z_loss * (log sum exp)^2.

    Smoothing: Szegedy et al. 2015, arXiv 1512.00567; z-loss: Chowdhery et al. 2022, arXiv 2204.02311.
    With `dft` each -log p(label) is multiplied by p, which is not differentiated (Wu et al. 2025, arXiv 2508.05629).
    """

    data = "tokens"

    def __init__(self, options: Sft) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        weight = float(batch.token_weights[batch.supervised].sum(dtype=torch.float64))
        return {"sft": weight, "z_loss": weight} if self.options.z_loss else {"sft": weight}

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        numbers = policy.map_logits(batch, self._measure)  # [T, 4]
        cost, square, likelihood, hits = (numbers * batch.token_weights[:, None].to(numbers)).sum(0)
        sums = {"sft": cost, "z_loss": self.options.z_loss * square} if self.options.z_loss else {"sft": cost}
        weight = self.terms(batch)["sft"]
        metrics = {"accuracy": (hits.detach(), weight), "nll": (-likelihood.detach(), weight)}
        return LossOutput(sums=sums, metrics=metrics)

    def _measure(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return [C, 4] from logits [C, V]: the shaped cost, (log sum exp)^2, log p(label), and 1 for a right guess."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = logits.logsumexp(-1)
        likelihood = logits.gather(-1, labels[:, None]).squeeze(-1) - total
        share = self.options.label_smoothing
        cost = -likelihood * likelihood.detach().exp() if self.options.dft else -likelihood
        if share:
            cost = (1 - share) * cost + share * (total - logits.mean(-1))
        hits = (logits.detach().argmax(-1) == labels).to(cost.dtype)
        return torch.stack([cost, total**2, likelihood.detach(), hits], dim=-1)


def reference(options: Sft, policy: Any, batch: Batch) -> dict[str, Tensor]:
    """Return the loss's sums computed token by token, for the conformance kit."""
    if options == Sft():
        return {"sft": -_add_up(batch, policy.token_logprobs(batch))}
    logits = policy.map_logits(batch, lambda rows, labels: rows)  # [T, V]
    logprobs = logits.log_softmax(-1)
    chances = torch.full_like(logits, options.label_smoothing / logits.shape[-1])
    chances[batch.supervised, batch.labels[batch.supervised]] += 1 - options.label_smoothing
    costs = -(chances * logprobs).sum(-1)
    sums = {"sft": _add_up(batch, costs * (-costs).exp().detach() if options.dft else costs)}
    if options.z_loss:
        sums["z_loss"] = _add_up(batch, options.z_loss * logits.exp().sum(-1).log().square())
    return sums


def _add_up(batch: Batch, values: Tensor) -> Tensor:
    total = values.new_zeros(())
    for position in batch.supervised.tolist():
        total = total + values[position] * batch.token_weights[position]
    return total
