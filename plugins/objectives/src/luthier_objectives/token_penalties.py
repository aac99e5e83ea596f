"""Penalties of what the policy says of each token: the divergence from the reference."""

from __future__ import annotations

import torch
from luthier import Batch, Policy
from torch import Tensor

from luthier_objectives import Kl


class KlPenalty:
    """KL(policy || reference) of each supervised token over the whole vocabulary, or its reverse, times `weight`."""

    def __init__(self, options: Kl) -> None:
        self.options = options

    def measure_tokens(self, policy: Policy, batch: Batch) -> Tensor:
        return self.options.weight * policy.map_logits(batch, self._diverge, other=policy.reference())

    def _diverge(self, logits: Tensor, labels: Tensor, others: Tensor) -> Tensor:
        """Return [C] from logits [C, V] of the policy and of the reference."""
        own, other = widen(logits).log_softmax(-1), widen(others).log_softmax(-1)
        return kl_divergence(own, other) if self.options.divergence == "reverse_kl" else kl_divergence(other, own)


def kl_divergence(own: Tensor, other: Tensor) -> Tensor:
    """Return KL(own || other), [C], of log-probabilities [C, V]."""
    return (own.exp() * (own - other)).sum(-1)


def widen(logits: Tensor) -> Tensor:
    """Return the logits in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
