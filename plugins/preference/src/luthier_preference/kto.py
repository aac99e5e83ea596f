"""KTO (Ethayarajh et al. 2024, arXiv 2402.01306), as TRL computes it over one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from luthier import Batch, LossOutput, Policy, Unit
from torch import Tensor

from luthier_preference.options import ApoZeroUnpaired, Kto


class KtoLoss:
    """A good answer costs 1 - sigmoid(beta * (log ratio - z)), a bad one 1 - sigmoid(beta * (z - log ratio)).

    z is the mean log ratio of the global batch's mismatched pairs, at least 0, without gradient. A mismatched pair is
    the prompt of one row with the answer of the row before it.
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

    def scores(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = policy.token_logprobs(batch)
        ratios = batch.sum_by_document(logprobs - policy.reference().token_logprobs(batch))
        texts = batch.documents("text").to(ratios.device)
        mismatched = batch.documents("mismatched").to(ratios.device)
        logps = batch.sum_by_document(logprobs.detach())[texts]
        fixed = {"mismatched": ratios.detach()[mismatched], "label": batch.columns["label"], "logps": logps}
        return ratios[texts], fixed

    def combine(self, scores: Tensor, fixed: Mapping[str, Tensor]) -> LossOutput:
        label, zero = fixed["label"], fixed["mismatched"].mean().clamp(min=0)
        weights = torch.where(label, self.options.desirable_weight, self.options.undesirable_weight)
        values = torch.sigmoid(self.options.beta * torch.where(label, scores - zero, zero - scores))
        metrics = describe_answers(self.options.beta * scores, fixed["logps"], label)
        metrics["kl"] = (zero.double() * len(scores), float(len(scores)))
        return LossOutput(sums={"kto": (weights * (1 - values)).sum()}, metrics=metrics)

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        return self.combine(*self.scores(policy, batch))


class ApoZeroUnpairedLoss:
    """A good answer costs 1 - sigmoid(r), a bad one sigmoid(r), where r is beta * log ratio.

    The unpaired form of APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7): KTO with z = 0, so that no
    answer depends on another.
    """

    data = "unpaired"

    def __init__(self, options: ApoZeroUnpaired) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"apo": float(batch.num_units)}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        logprobs, label = policy.token_logprobs(batch), batch.columns["label"]
        ratios = batch.sum_by_document(logprobs - policy.reference().token_logprobs(batch))
        texts = batch.documents("text").to(ratios.device)
        rewards = self.options.beta * ratios[texts]
        weights = torch.where(label, self.options.desirable_weight, self.options.undesirable_weight)
        costs = torch.sigmoid(torch.where(label, -rewards, rewards))  # 1 - sigmoid(r) is sigmoid(-r)
        metrics = describe_answers(rewards, batch.sum_by_document(logprobs.detach())[texts], label)
        metrics.pop("rewards/margins")  # a margin needs the whole global batch
        return LossOutput(sums={"apo": (weights * costs).sum()}, metrics=metrics)


def describe_answers(rewards: Tensor, logps: Tensor, label: Tensor) -> dict[str, tuple[Tensor | float, Tensor | float]]:
    """Return the metrics of judged answers [U] as (sum, count): good ones are `chosen`, bad ones `rejected`.

    The margin exists only for a global batch with both, as in TRL.
    """
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {}
    means = []
    for side, flags in (("chosen", label), ("rejected", ~label)):
        count = flags.double().sum()
        for name, values in (("rewards", rewards), ("logps", logps)):
            metrics[f"{name}/{side}"] = (torch.where(flags, values.detach().double(), 0.0).sum(), count)
        means.append(metrics[f"rewards/{side}"][0] / count.clamp(min=1.0))
    both = (label.any() & (~label).any()).double()
    metrics["rewards/margins"] = (both * (means[0] - means[1]), both)
    return metrics
