"""KTO (Ethayarajh et al. 2024, arXiv 2402.01306), as TRL computes it over one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from luthier import Batch, LossOutput, Unit
from torch import Tensor

from luthier_outside_kto import Kto


class KtoLoss:
    """An answer judged good costs 1 - sigmoid(beta * (its log ratio - z)), a bad one 1 - sigmoid(beta * (z - ratio)).

    z is the mean log ratio of the batch's mismatched pairs, at least 0 and not differentiated.
    """

    data, couples = "unpaired", "batch"

    def __init__(self, options: Kto) -> None:
        self.options = options

    def arrange(self, units: Sequence[Unit]) -> Sequence[Unit]:
        """Add to each unit its prompt with the answer of the unit before it."""
        texts = [unit.documents["text"] for unit in units]
        answers = [text.answer for text in texts[-1:] + texts[:-1]]
        return [u.with_document("mismatched", t.prompt + a) for u, t, a in zip(units, texts, answers, strict=True)]

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"kto": float(batch.num_units)}

    def scores(self, policy: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        gains = policy.token_logprobs(batch) - policy.reference().token_logprobs(batch)
        ratios = batch.sum_by_document(gains)
        fixed = {"mismatched": ratios[batch.documents("mismatched")], "label": batch.columns["label"]}
        return ratios[batch.documents("text")], fixed

    def combine(self, scores: Tensor, fixed: Mapping[str, Tensor]) -> LossOutput:
        label, zero = fixed["label"], fixed["mismatched"].mean().clamp(min=0)
        weights = torch.where(label, self.options.desirable_weight, self.options.undesirable_weight)
        values = torch.sigmoid(self.options.beta * torch.where(label, scores - zero, zero - scores))
        wins = ((scores.detach() > zero) == label).double().sum()
        metrics = {"kl": (zero * len(scores), len(scores)), "wins": (wins, len(scores))}
        return LossOutput(sums={"kto": (weights * (1 - values)).sum()}, metrics=metrics)

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        return self.combine(*self.scores(policy, batch))
