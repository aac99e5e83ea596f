"""DPO (Rafailov et al. 2023, arXiv 2305.18290) and the other losses on log ratios of a pair, as TRL computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from luthier import Batch, LossOutput, Policy
from torch import Tensor

from luthier_preference.formulas import FORMULAS, Sides
from luthier_preference.options import SORTING, Dpo
from luthier_preference.pairs import chosen_positions, count_pairs, describe_pairs, sum_pairs


class DpoLoss:
    """The weighted sum of loss types. Each is a mean over pairs of a function of both log ratios to the reference.

    The loss type `sft` is a mean over the tokens of chosen answers. Types that sort couple the global batch, so that
    they compare the same answers whatever the packing. TRL 1.16 ignores `label_smoothing` with type sigmoid; here it is
    conservative DPO (Mitchell 2023).
    """

    data = "preference"

    def __init__(self, options: Dpo) -> None:
        self.options = options
        self.couples = "batch" if set(SORTING) & set(options.mixture) else "nothing"

    def terms(self, batch: Batch) -> dict[str, float]:
        weights = {"dpo": float(len(batch.pairs))} if set(self.options.mixture) - {"sft"} else {}
        if "sft" in self.options.mixture:
            weights["nll_loss"] = float(len(chosen_positions(batch)))
        return weights

    def scores(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return [P, 5]: log ratios and log-probabilities of chosen and rejected, and the chosen log-likelihood."""
        logprobs, reference = policy.token_logprobs(batch), policy.reference().token_logprobs(batch)
        weights = 1.0 if self.options.ld_alpha is None else weigh_tail(batch, logprobs, self.options.ld_alpha)
        columns = [sum_pairs(batch, weights * (logprobs - reference)), sum_pairs(batch, weights * logprobs)]
        fixed = {"reference": sum_pairs(batch, weights * reference), "lengths": count_pairs(batch, logprobs)}
        return torch.cat([*columns, sum_pairs(batch, logprobs)[:, :1]], dim=1), fixed

    def combine(self, scores: Tensor, fixed: Mapping[str, Tensor]) -> LossOutput:
        sides = Sides(ratios=scores[:, :2], logps=scores[:, 2:4], **fixed)
        mixture = dict(self.options.mixture)
        likelihood = mixture.pop("sft", 0.0)
        parts = {kind: weight * FORMULAS[kind](sides, self.options).sum() for kind, weight in mixture.items()}
        sums = {"dpo": cast(Tensor, sum(parts.values()))} if parts else {}
        shares: dict[str, tuple[Tensor, Tensor | float]] = {
            kind: (part.detach(), float(len(scores))) for kind, part in parts.items()
        }
        if likelihood:
            sums["nll_loss"] = -likelihood * scores[:, 4].sum()
            shares["sft"] = (sums["nll_loss"].detach(), sides.lengths[:, 0].double().sum())
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {
            **describe_pairs(self.options.beta * sides.ratios, sides.logps)
        }
        if len(shares) > 1:
            metrics |= {f"part/{kind}": share for kind, share in shares.items()}
        return LossOutput(sums=sums, metrics=metrics)

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        return self.combine(*self.scores(policy, batch))


def weigh_tail(batch: Batch, like: Tensor, share: float) -> Tensor:
    """Return [T]: `share` for tokens beyond the length of the pair's shorter answer, else 1.

    Liu et al. 2024, arXiv 2409.06411.
    """
    counted = like.new_zeros(batch.num_tokens).index_fill(0, batch.supervised, 1.0)
    before = counted.cumsum(0) - counted
    starts = before[batch.document_starts[:-1].to(before.device)]
    owners = batch.document_ids()
    ranks = before - starts[owners]  # number of supervised tokens of its document before each token
    pairs = batch.pairs.to(like.device)
    shared = like.new_full((batch.num_documents,), float("inf"))
    shared[pairs] = batch.sum_by_document(counted)[pairs].min(dim=1, keepdim=True).values.expand(-1, 2)
    return torch.where(ranks < shared[owners], 1.0, share).to(like)
