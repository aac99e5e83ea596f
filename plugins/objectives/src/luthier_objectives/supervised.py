"""Supervised losses that read all logits of a token: smoothing, z-loss, DFT, and a divergence from the reference."""

from __future__ import annotations

import torch
from luthier import Batch, LossOutput, Policy
from torch import Tensor

from luthier_objectives import AnchoredSft, ShapedSft


class ShapedLoss:
    """The cost per supervised token is -(1 - s) log p(label) - s mean(log p) + z_loss * (log sum exp)^2.

    Smoothing: Szegedy et al. 2015, arXiv 1512.00567; z-loss: Chowdhery et al. 2022, arXiv 2204.02311.
    With `dft` each -log p(label) is multiplied by p, which is not differentiated (Wu et al. 2025, arXiv 2508.05629).
    """

    data = "tokens"

    def __init__(self, options: ShapedSft) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        weight = float(batch.token_weights[batch.supervised].sum(dtype=torch.float64))
        return {"sft": weight, **({"z_loss": weight} if self.options.z_loss else {})}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        return self._sum_up(batch, policy.map_logits(batch, self._measure))

    def _measure(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return [C, 3] from logits [C, V]: the shaped cost, (log sum exp)^2 and log p(label)."""
        logits = widen(logits)
        total = logits.logsumexp(-1)
        likelihood = logits.gather(-1, labels[:, None]).squeeze(-1) - total
        share = self.options.label_smoothing
        cost = -likelihood * likelihood.detach().exp() if self.options.dft else -likelihood
        if share:
            cost = (1 - share) * cost + share * (total - logits.mean(-1))
        return torch.stack([cost, total**2, likelihood.detach()], dim=-1)

    def _sum_up(self, batch: Batch, numbers: Tensor) -> LossOutput:
        cost, square, likelihood = (numbers[:, :3] * batch.token_weights[:, None].to(numbers)).sum(0)
        sums = {"sft": cost}
        if self.options.z_loss:
            sums["z_loss"] = self.options.z_loss * square
        return LossOutput(sums=sums, metrics={"nll": (-likelihood.detach(), self.terms(batch)["sft"])})


class AnchoredLoss(ShapedLoss):
    """The shaped loss plus kl_weight * KL(policy || reference) of each supervised token."""

    options: AnchoredSft

    def terms(self, batch: Batch) -> dict[str, float]:
        weights = super().terms(batch)
        return {**weights, "kl_loss": weights["sft"]}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        measures = policy.map_logits(batch, self._measure_both, other=policy.reference())
        output = self._sum_up(batch, measures)
        divergence = (measures[:, 3] * batch.token_weights.to(measures)).sum()
        sums = {**output.sums, "kl_loss": self.options.kl_weight * divergence}
        return LossOutput(sums=sums, metrics={**output.metrics, "kl": (divergence.detach(), self.terms(batch)["sft"])})

    def _measure_both(self, logits: Tensor, labels: Tensor, others: Tensor) -> Tensor:
        """Return [C, 4]: the columns of `_measure`, and KL(policy || reference)."""
        divergence = kl_divergence(widen(logits).log_softmax(-1), widen(others).log_softmax(-1))
        return torch.cat([self._measure(logits, labels), divergence[:, None]], dim=-1)


def kl_divergence(own: Tensor, other: Tensor) -> Tensor:
    """Return KL(own || other), [C], of log-probabilities [C, V]."""
    return (own.exp() * (own - other)).sum(-1)


def widen(logits: Tensor) -> Tensor:
    """Return the logits in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
