"""Unlearning: rows with `forget: true` become less likely, and the others stay likely."""

from __future__ import annotations

import torch
from luthier import Batch, LossOutput, Policy
from torch import Tensor
from torch.nn.functional import softplus

from luthier_objectives import Negated, Npo


class NpoLoss:
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868, equation 3).

    A row to forget costs (2 / beta) log(1 + ratio^beta), where ratio is the probability of its answer divided by the
    reference's. A token of the other rows costs -retain_weight * log p.
    """

    data = "tokens"

    def __init__(self, options: Npo) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        rows, retained = float(weigh_rows(batch).sum(dtype=torch.float64)), retained_weights(batch)
        term = {"retain": float(retained.sum(dtype=torch.float64))} if self.options.retain_weight else {}
        return {"forget": rows, **term}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        logprobs = policy.token_logprobs(batch)
        ratios = batch.sum_by_document(logprobs - policy.reference().token_logprobs(batch))  # [D]
        rows, beta = weigh_rows(batch).to(ratios), self.options.beta
        sums = {"forget": 2 / beta * (rows * softplus(beta * ratios, threshold=60.0)).sum()}
        metrics = {"log_ratio/forget": ((rows * ratios.detach()).sum(), rows.sum())}
        return _with_retained(self.options.retain_weight, batch, logprobs, LossOutput(sums=sums, metrics=metrics))


class NegatedLoss:
    """Gradient ascent: a token to forget costs forget_weight * log p, any other -retain_weight * log p."""

    data = "tokens"

    def __init__(self, options: Negated) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        term = {"retain": float(retained_weights(batch).sum(dtype=torch.float64))} if self.options.retain_weight else {}
        return {"forget": float(forgotten_weights(batch).sum(dtype=torch.float64)), **term}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        logprobs = policy.token_logprobs(batch)
        weights = forgotten_weights(batch).to(logprobs)
        total = (weights * logprobs).sum()
        metrics = {"nll/forget": (-total.detach(), weights.sum())}
        output = LossOutput(sums={"forget": self.options.forget_weight * total}, metrics=metrics)
        return _with_retained(self.options.retain_weight, batch, logprobs, output)


def _with_retained(weight: float, batch: Batch, logprobs: Tensor, output: LossOutput) -> LossOutput:
    """Return the output with the likelihood of the rows to keep added."""
    weights = retained_weights(batch).to(logprobs)
    total = -(weights * logprobs).sum()
    metrics = {**output.metrics, "nll/retain": (total.detach(), weights.sum())}
    return LossOutput(sums={**output.sums, **({"retain": weight * total} if weight else {})}, metrics=metrics)


def flag_documents(batch: Batch) -> Tensor:
    """Return [D]: 1 for each document of a row to forget, else 0."""
    flags = batch.token_weights.new_zeros(batch.num_documents)
    return flags.index_copy(0, batch.documents("text").to(flags.device), batch.columns["forget"].to(flags))


def counted_weights(batch: Batch) -> Tensor:
    """Return the weight of each supervised token, and 0 elsewhere, [T]."""
    weights = torch.zeros_like(batch.token_weights)
    return weights.index_copy(0, batch.supervised, batch.token_weights[batch.supervised])


def forgotten_weights(batch: Batch) -> Tensor:
    """Return the weights of supervised tokens to forget, [T]."""
    return counted_weights(batch) * flag_documents(batch)[batch.document_ids()]


def retained_weights(batch: Batch) -> Tensor:
    """Return the weights of the other supervised tokens, [T]."""
    return counted_weights(batch) * (1 - flag_documents(batch)[batch.document_ids()])


def weigh_rows(batch: Batch) -> Tensor:
    """Return the weight of each row to forget that has a supervised token, else 0, [D]."""
    weights = batch.token_weights[batch.document_starts[:-1].to(batch.device)]
    has_labels = batch.sum_by_document(torch.zeros_like(batch.token_weights).index_fill(0, batch.supervised, 1.0)) > 0
    return weights * flag_documents(batch) * has_labels
