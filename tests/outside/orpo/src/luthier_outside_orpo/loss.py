"""ORPO (Hong et al. 2024, arXiv 2403.07691), with the likelihood over prompt and answer, as in TRL."""

from __future__ import annotations

from typing import Any

import torch
from luthier import Batch, LossOutput
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier_outside_orpo import Orpo


class OrpoLoss:
    """Per token of chosen texts: -log p. Per pair: -beta * log sigmoid of the log odds ratio of both answers.

    An answer's odds are those of its mean token probability.
    """

    data = "preference"

    def __init__(self, options: Orpo) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        likelihood = batch.supervised_by(self.chosen_labels(batch))
        return {"likelihood": float(len(likelihood)), "odds": float(len(batch.pairs))}

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        means = answer_means(policy, batch)
        ratios = logsigmoid(log_odds(means[:, 0]) - log_odds(means[:, 1]))
        texts = policy.token_logprobs(batch, labels=self.chosen_labels(batch))
        wins = (means[:, 0] > means[:, 1]).double().sum()
        sums = {"likelihood": -texts.sum(), "odds": -self.options.beta * ratios.sum()}
        return LossOutput(sums=sums, metrics={"wins": (wins, float(len(means)))})

    def chosen_labels(self, batch: Batch) -> Tensor:
        """Return [T]: every token of chosen answers and of the prompts that they continue, -100 elsewhere."""
        counted = torch.zeros(batch.num_documents, dtype=torch.bool)
        documents = batch.pairs[:, 0]
        while len(documents):
            counted[documents] = True
            documents = batch.continues[documents]
            documents = documents[documents >= 0]
        return torch.where(counted.to(batch.device)[batch.document_ids()], batch.input_ids, -100)


def answer_means(policy: Any, batch: Batch) -> Tensor:
    """Return [P, 2]: the mean log-probability of the chosen and of the rejected answer's tokens."""
    logprobs = policy.token_logprobs(batch)
    counted = torch.zeros_like(logprobs).index_fill(0, batch.supervised, 1.0)
    means = batch.sum_by_document(logprobs) / batch.sum_by_document(counted).clamp(min=1.0)
    return means[batch.pairs.to(means.device)]


def log_odds(means: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p, finite where p is next to 1 (Maechler 2012)."""
    below = means.clamp(max=-torch.finfo(means.dtype).tiny)
    near = below > -0.6931471805599453  # log 2
    rest = torch.where(near, (-torch.expm1(torch.where(near, below, -1.0))).log(),
                       torch.log1p(-torch.where(near, -1.0, below).exp()))  # fmt: skip
    return means - rest


def plain_sums(options: Orpo, policy: Any, batch: Batch) -> dict[str, Tensor]:
    """Return the same sums pair by pair; for the tests."""
    answers = policy.token_logprobs(batch)
    texts = policy.token_logprobs(batch, labels=batch.input_ids)
    documents, supervised = batch.document_ids(), torch.zeros(batch.num_tokens, dtype=torch.bool)
    supervised[batch.supervised] = True
    likelihood, odds = answers.new_zeros(()), answers.new_zeros(())
    for chosen, rejected in batch.pairs.tolist():
        better, worse = (answers[supervised & (documents == side)].mean() for side in (chosen, rejected))
        ratio = better - worse - (torch.log1p(-better.exp()) - torch.log1p(-worse.exp()))
        odds = odds - options.beta * logsigmoid(ratio)
        likelihood = likelihood - texts[documents == chosen].sum()
    return {"likelihood": likelihood, "odds": odds}
