"""Distillation from a live teacher (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from luthier import Batch, LossOutput, Policy
from torch import Tensor

from luthier_outside_distill import Distill


class DistillLoss:
    """Per supervised token: temperature^2 * KL(teacher || policy), both softened by the temperature."""

    data = "tokens"

    def __init__(self, options: Distill) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"divergence": float(batch.token_weights[batch.supervised].sum())}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        found = policy.map_logits(batch, self.divergence, other=policy.teacher())
        return LossOutput(sums={"divergence": (found * batch.token_weights).sum()})

    def divergence(self, own: Tensor, labels: Tensor, theirs: Tensor) -> Tensor:
        """Return [C] from the logits [C, V] of both."""
        soft = self.options.temperature
        mine, other = softened(own, soft), softened(theirs, soft)
        return soft**2 * (other.exp() * (other - mine)).sum(-1)


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities in float32 or better."""
    wide = logits.double() if logits.element_size() == 8 else logits.float()
    return (wide / temperature).log_softmax(-1)


def plain_sums(options: Distill, policy: Policy, batch: Batch) -> dict[str, Tensor]:
    """Return the same sum from all logits at once; for the tests."""
    sources, soft = batch.previous[batch.supervised], options.temperature
    teacher = policy.teacher()
    mine = softened(policy.head(policy.states(batch)[sources]), soft)
    other = softened(teacher.head(teacher.states(batch)[sources]), soft)
    found = soft**2 * (other.exp() * (other - mine)).sum(-1)
    return {"divergence": (found * batch.token_weights[batch.supervised]).sum()}
