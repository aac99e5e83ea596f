"""InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) with the other passages of the global batch as negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from luthier import Batch, LossOutput
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from luthier_outside_infonce import Infonce


class InfonceLoss:
    """Each query costs the cross-entropy of its own passage among all; the cosine is that of mean states."""

    data, couples = "documents", "batch"

    def __init__(self, options: Infonce) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"infonce": float(batch.num_units)}

    def scores(self, policy: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return [U, 2, H]: the directions of query and passage."""
        (states,) = policy.hidden(batch, [-1])
        states = states.to(torch.promote_types(torch.float32, states.dtype))
        means = batch.sum_by_document(states) / batch.lengths.to(states)[:, None]
        sides = torch.stack([batch.documents("query"), batch.documents("passage")], 1)
        return normalize(means[sides.to(means.device)], dim=-1), {}

    def combine(self, scores: Tensor, fixed: Mapping[str, Tensor]) -> LossOutput:
        queries, passages = scores.unbind(1)
        likeness = queries @ passages.T / self.options.temperature  # [U, U]
        own = torch.arange(len(likeness), device=likeness.device)
        found = (likeness.detach().argmax(-1) == own).double().sum()
        total = cross_entropy(likeness, own, reduction="sum")
        return LossOutput(sums={"infonce": total}, metrics={"found": (found, len(own))})

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        return self.combine(*self.scores(policy, batch))
