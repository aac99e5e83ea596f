"""ORPO (Hong et al. 2024, arXiv 2403.07691): likelihood and odds ratio, without a reference."""

from __future__ import annotations

from typing import Final

import torch
from luthier import Batch, LossOutput, Policy
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier_preference.options import Orpo
from luthier_preference.pairs import chosen_positions, count_pairs, describe_pairs, sum_pairs

LOG_HALF: Final = -0.6931471805599453


class OrpoLoss:
    """A chosen token costs -log p, and a pair -beta * log sigmoid(log odds ratio of both answers).

    The odds of an answer are those of its mean token probability. TRL's likelihood covers prompt and answer, which is
    `nll_scope: full` here. For a probability of 1 TRL's gradient is NaN; this one is finite.
    """

    data = "preference"

    def __init__(self, options: Orpo) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"nll_loss": float(len(self._positions(batch))), "odds_ratio_loss": float(len(batch.pairs))}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        logprobs = policy.token_logprobs(batch)
        means = sum_pairs(batch, logprobs) / count_pairs(batch, logprobs)
        odds = log_odds(means[:, 0]) - log_odds(means[:, 1])
        full = self.options.nll_scope == "full"
        texts = policy.token_logprobs(batch, labels=label_chosen(batch)) if full else logprobs
        likelihood = texts.index_select(0, self._positions(batch))
        sums = {"nll_loss": -likelihood.sum(), "odds_ratio_loss": -self.options.beta * logsigmoid(odds).sum()}
        metrics = describe_pairs(self.options.beta * means, means)
        own = {"log_odds_chosen": odds, "log_odds_ratio": logsigmoid(odds)}
        metrics |= {name: (values.detach().double().sum(), float(len(values))) for name, values in own.items()}
        return LossOutput(sums=sums, metrics=metrics)

    def _positions(self, batch: Batch) -> Tensor:
        """Return the positions that count in the likelihood, [S'] int64."""
        if self.options.nll_scope == "completion":
            return chosen_positions(batch)
        return batch.supervised_by(label_chosen(batch))


def label_chosen(batch: Batch) -> Tensor:
    """Return [T]: the tokens of chosen answers and of the prompts that they continue, -100 elsewhere."""
    counted = torch.zeros(batch.num_documents, dtype=torch.bool)
    documents = batch.pairs[:, 0]
    while len(documents):
        counted[documents] = True
        documents = batch.continues[documents]
        documents = documents[documents >= 0]
    return torch.where(counted.to(batch.device)[batch.document_ids()], batch.input_ids, -100)


def log_odds(means: Tensor) -> Tensor:
    """Return log(p / (1 - p)) from log p, finite for p near 1: log(1 - p) by branch (Maechler 2012)."""
    below = means.clamp(max=-torch.finfo(means.dtype).tiny)
    near = below > LOG_HALF
    close = (-torch.expm1(torch.where(near, below, -1.0))).log()
    far = torch.log1p(-torch.where(near, -1.0, below).exp())
    return means - torch.where(near, close, far)
