"""Supervised fine-tuning: next-token cross-entropy over the supervised tokens, each weighted by its example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.data.batches.batch import Batch
from luthier.plugins.contracts.values import LossOutput
from luthier.plugins.records import NoOptions


class SupervisedLoss:
    """sum over t of w_t * -log p(label_t), over the sum of w_t."""

    data = "tokens"

    def __init__(self, options: NoOptions) -> None:
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


def reference(options: NoOptions, policy: Any, batch: Batch) -> dict[str, Tensor]:
    """Return the loss's sums computed token by token, for the conformance kit."""
    logprobs = policy.token_logprobs(batch)
    total = logprobs.new_zeros(())
    for position in batch.supervised.tolist():
        total = total - logprobs[position] * batch.token_weights[position]
    return {"sft": total}
