"""Losses: one that is sound, and those that break one rule each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from luthier.data.batches.batch import Batch
from luthier.plugins.contracts.values import LossOutput
from torch import Tensor


class Nll:
    """sum over t of w_t * -log p(label_t)."""

    data = "tokens"

    def __init__(self, options: Any) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"nll": self.weight(batch)}

    def weight(self, batch: Batch) -> float:
        return float(batch.token_weights[batch.supervised].sum())

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        total = -self.weighted(policy, batch).sum()
        return LossOutput(sums={"nll": total}, metrics={"cost": (total.detach(), self.weight(batch))})

    def weighted(self, policy: Any, batch: Batch) -> Tensor:
        """[T]"""
        return policy.token_logprobs(batch) * batch.token_weights

    def coefficients(self, batch: Batch) -> Tensor:
        return -batch.token_weights


def reference(options: Any, policy: Any, batch: Batch) -> dict[str, Tensor]:
    logprobs = policy.token_logprobs(batch)
    return {"nll": -sum(logprobs[t] * batch.token_weights[t] for t in batch.supervised.tolist())}


class MeanOfTokens(Nll):
    def __call__(self, policy, batch):
        return LossOutput(sums={"nll": -self.weighted(policy, batch).sum() / max(self.terms(batch)["nll"], 1e-9)})


class CountsMicroBatches(Nll):
    def terms(self, batch):
        return {"nll": float(len(batch.supervised) > 0)}


class MissingTerm(Nll):
    def terms(self, batch):
        return {}


class CountsPrompt(Nll):
    def weighted(self, policy, batch):
        return super().weighted(policy, attrs.evolve(batch, labels=batch.input_ids))


class CountsAllTokens(Nll):
    def terms(self, batch):
        return {"nll": float(batch.token_weights.sum())}


class ForgetsWeights(Nll):
    def terms(self, batch):
        return {"nll": float(len(batch.supervised))}

    def weighted(self, policy, batch):
        return policy.token_logprobs(batch)

    def coefficients(self, batch):
        return -torch.ones(batch.num_tokens)


class LogOfSoftmax(Nll):
    def weighted(self, policy, batch):
        def chosen(logits, labels):
            return logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

        probabilities = policy.map_logits(batch, chosen)
        return torch.where(batch.labels >= 0, probabilities, 1.0).log() * batch.token_weights

    def coefficients(self, batch):
        return None


class Standardised(Nll):
    """Divides by the spread over the whole batch, so that each document feels the others."""

    def weighted(self, policy, batch):
        values = super().weighted(policy, batch)
        return values / (1.0 + values.detach().abs().max())


class WeighsByPlace(Nll):
    def weighted(self, policy, batch):
        return super().weighted(policy, batch) * (1.0 + batch.document_ids())


class WrongSign(Nll):
    def coefficients(self, batch):
        return batch.token_weights


class Scaled(Nll):
    def weighted(self, policy, batch):
        return 1.01 * super().weighted(policy, batch)

    def coefficients(self, batch):
        return -1.01 * batch.token_weights


class MeanMetric(Nll):
    def __call__(self, policy, batch):
        output = super().__call__(policy, batch)
        total, weight = output.metrics["cost"]
        return LossOutput(sums=output.sums, metrics={"cost": (total / max(weight, 1e-9), 1.0)})


class Squared(Nll):
    """A sound loss that couples the batch: the square of the sum over all documents."""

    couples = "batch"

    def scores(self, policy: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return batch.sum_by_document(self.weighted(policy, batch))[batch.documents("text")], {}

    def combine(self, scores: Tensor, fixed: Mapping[str, Tensor]) -> LossOutput:
        return LossOutput(sums={"nll": scores.sum() ** 2})

    def coefficients(self, batch: Batch) -> None:
        return None


class MeanOfScores(Squared):
    def combine(self, scores, fixed):
        return LossOutput(sums={"nll": scores.mean() ** 2})


class CouplesWithoutScores(Nll):
    couples = "batch"


class OtherData(Nll):
    data = "preference"


class NoTerms:
    data = "tokens"

    def __init__(self, options: Any) -> None: ...

    def __call__(self, policy, batch):
        return LossOutput(sums={})


class ReadsTheWholeTeacher(Nll):
    """The divergence from a teacher, of which it says that it reads the likeliest token alone."""

    teacher_reads = (1, 1.0)

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        def diverge(own: Tensor, labels: Tensor, theirs: Tensor) -> Tensor:
            return -(theirs.softmax(-1) * own.log_softmax(-1)).sum(-1)

        costs = policy.map_logits(batch, diverge, other=policy.teacher())
        return LossOutput(sums={"nll": (costs * batch.token_weights).sum()})
