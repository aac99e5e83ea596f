"""Distillation from a live teacher (Hinton et al. 2015, arXiv 1503.02531; Agarwal et al. 2023, arXiv 2306.13649)."""

from __future__ import annotations

import torch
from luthier import Batch, LossOutput, LuthierError, Policy
from torch import Tensor

from luthier_distill import Distill
from luthier_distill.attention_relations import sum_attention
from luthier_distill.divergences import DIVERGENCES, likeliest
from luthier_distill.hidden_states import sum_distances, widen
from luthier_distill.whole_divergence import WholeDivergence, scaled_logprobs


class DistillLoss:
    """The weighted sum of four costs of each supervised token.

    They are temperature^2 * divergence(teacher, policy), -ce_weight * log p(label), hidden_weight * distance of the
    hidden states that predict the token, and attention_weight * divergence of that position's relations. The logits of
    both models exist for a chunk of positions at a time, and are computed again in the backward pass.
    """

    data = "tokens"

    def __init__(self, options: Distill) -> None:
        self.options = options
        is_partial = options.top_k is not None and not options.hidden_weight and not options.attention_weight
        self.teacher_reads = (options.top_k, options.temperature) if is_partial else None

    def terms(self, batch: Batch) -> dict[str, float]:
        weight = float(batch.token_weights[batch.supervised].sum(dtype=torch.float64))
        options = self.options
        added = {"cross_entropy": options.ce_weight, "hidden": options.hidden_weight,
                 "attention": options.attention_weight}  # fmt: skip
        return {"divergence": weight, **{name: weight for name, factor in added.items() if factor}}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        distances = self._measure_layers(policy, batch)
        token_terms = policy.map_logits(batch, self._compare, other=policy.teacher())  # [T, 3]
        divergence, likelihood, agreement = (token_terms * batch.token_weights[:, None].to(token_terms)).sum(0)
        sums = {"divergence": divergence}
        if self.options.ce_weight:
            sums["cross_entropy"] = -self.options.ce_weight * likelihood
        weight = self.terms(batch)["divergence"]
        metrics = {"nll": (-likelihood.detach(), weight), "teacher_agreement": (agreement.detach(), weight)}
        for term, (factor, metric, distance) in distances.items():
            sums[term] = factor * distance
            metrics[metric] = (distance.detach(), weight)
        return LossOutput(sums=sums, metrics=metrics)

    def _measure_layers(self, policy: Policy, batch: Batch) -> dict[str, tuple[float, str, Tensor]]:
        """Return for each term of layers its weight, its metric and its sum.

        It comes before the logits, so that a single pass of each body keeps what is compared.
        """
        options, measured = self.options, {}
        if options.hidden_weight:
            distance = sum_distances(options, policy, batch)
            measured["hidden"] = (options.hidden_weight, "hidden_distance", distance)
        if options.attention_weight:
            divergence = sum_attention(options, policy, batch)
            measured["attention"] = (options.attention_weight, "attention_divergence", divergence)
        return measured

    def _compare(self, own: Tensor, labels: Tensor, theirs: Tensor) -> Tensor:
        """Return [C, 3] from logits [C, V]: divergence, log p(label), and 1 if both rank the same token first."""
        options, agreement = self.options, own.argmax(-1) == theirs.argmax(-1)
        beta = options.beta or 0.5
        if options.top_k is None:
            divergence = WholeDivergence.apply(own, theirs, options.divergence, options.temperature, beta)
        else:
            _check_count(options.top_k, theirs.shape[-1])
            student, teacher = (scaled_logprobs(logits, options.temperature) for logits in (own, theirs))
            student, teacher = likeliest(student, teacher, options.top_k, options.add_tail)
            divergence = options.temperature**2 * DIVERGENCES[options.divergence](student, teacher, beta)
        likelihood = _likelihood(own if options.ce_weight else own.detach(), labels)
        return torch.stack([divergence, likelihood, agreement.to(divergence)], dim=-1)


def _likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p(label) [C] of logits [C, V]."""
    wide = widen(logits)
    return wide.gather(-1, labels[:, None]).squeeze(-1) - wide.logsumexp(-1)


def _check_count(count: int, tokens: int) -> None:
    """Raise `recipe-out-of-range` if more tokens are asked for than the vocabulary has."""
    if count > tokens:
        remedy = "Take fewer, or leave it out to compare every token."
        raise LuthierError("recipe-out-of-range", f"the vocabulary has {tokens} tokens", where="loss.top_k",
                           found=count, remedy=remedy)  # fmt: skip
