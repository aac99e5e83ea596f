"""CPO (Xu et al. 2024, arXiv 2401.08417) and SimPO (Meng et al. 2024, arXiv 2405.14734), as TRL computes them."""

from __future__ import annotations

import torch
from luthier import Batch, LossOutput, Policy
from torch import Tensor

from luthier_preference.options import Cpo, Simpo
from luthier_preference.pairs import (
    bounded_expm1,
    chosen_positions,
    count_pairs,
    describe_pairs,
    smoothed_logistic,
    sum_pairs,
)


class CpoLoss:
    """A pair costs the sigmoid, hinge or IPO loss of its log-probabilities, a chosen token -cpo_alpha log p."""

    data = "preference"

    def __init__(self, options: Cpo) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        pairs = {"cpo": float(len(batch.pairs))}
        return pairs | {"nll_loss": float(len(chosen_positions(batch)))} if self.options.cpo_alpha else pairs

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        logprobs = policy.token_logprobs(batch)
        logps = sum_pairs(batch, logprobs)
        if self.options.loss_type == "ipo":
            logps = logps / count_pairs(batch, logprobs)
        sums = {"cpo": self._compare(logps[:, 0] - logps[:, 1]).sum()}
        if self.options.cpo_alpha:
            likelihood = logprobs.index_select(0, chosen_positions(batch))
            sums["nll_loss"] = -self.options.cpo_alpha * likelihood.sum()
        return LossOutput(sums=sums, metrics=describe_pairs(self.options.beta * logps, logps))

    def _compare(self, differences: Tensor) -> Tensor:
        """Return the loss of each pair, [P]."""
        beta = self.options.beta
        if self.options.loss_type == "hinge":
            return torch.relu(1 - beta * differences)
        if self.options.loss_type == "ipo":
            return (differences - 1 / (2 * beta)) ** 2
        return smoothed_logistic(beta * differences, self.options.label_smoothing)


class SimpoLoss:
    """A pair costs -log sigmoid(beta * (difference of rewards) - gamma), with optional smoothing.

    A reward is the mean log-probability, or the AlphaPO reward (Gupta et al. 2025, arXiv 2501.03884). A token of a
    chosen answer costs -cpo_alpha * log p.
    """

    data = "preference"

    def __init__(self, options: Simpo) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        pairs = {"simpo": float(len(batch.pairs))}
        return pairs | {"nll_loss": float(len(chosen_positions(batch)))} if self.options.cpo_alpha else pairs

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        logprobs = policy.token_logprobs(batch)
        means = sum_pairs(batch, logprobs) / count_pairs(batch, logprobs)
        alpha = self.options.alpha
        rewards = -bounded_expm1(-alpha * means) / alpha if alpha else means
        logits = self.options.beta * (rewards[:, 0] - rewards[:, 1]) - self.options.gamma
        sums = {"simpo": smoothed_logistic(logits, self.options.label_smoothing).sum()}
        if self.options.cpo_alpha:
            likelihood = logprobs.index_select(0, chosen_positions(batch))
            sums["nll_loss"] = -self.options.cpo_alpha * likelihood.sum()
        return LossOutput(sums=sums, metrics=describe_pairs(self.options.beta * rewards, means))
