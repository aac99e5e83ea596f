"""InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) over the texts of the whole global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from luthier import Batch, LossOutput, Policy
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from luthier_contrastive import Infonce

NAMES: Final = ("query", "passage", "negative")


class InfonceLoss:
    """The cross-entropy of each query's own passage among all passages and hard negatives of the global batch.

    The embedding of a text is the direction of its pooled hidden states, and the logits are cosines / `temperature`.
    The loss couples the batch: each micro-batch is embedded, and computed again with the gradient of its embeddings. So
    the batch spans all ranks, and may be larger than memory (Gao et al. 2021, arXiv 2101.06983).
    """

    data, couples = "documents", "batch"

    def __init__(self, options: Infonce) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"infonce": float(batch.num_units)}

    def scores(self, policy: Policy, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return [U, N, H]: the directions of query, passage and, if rows have one, hard negative."""
        (states,) = policy.hidden(batch, [-1])
        texts = self._pool(states.to(torch.promote_types(torch.float32, states.dtype)), batch)  # [D, H]
        named = [name for name in NAMES if name in batch.named] or NAMES[:2]  # an idle batch has none
        rows = torch.stack([batch.documents(name) for name in named], dim=1).to(texts.device)
        return normalize(texts[rows], dim=-1), {}

    def combine(self, scores: Tensor, fixed: Mapping[str, Tensor]) -> LossOutput:
        queries, passages, count = scores[:, 0], scores[:, 1], len(scores)
        targets = scores[:, 1:].transpose(0, 1).flatten(0, 1)  # [(N - 1) U, H]: all passages, then all negatives
        logits = queries @ targets.T / self.options.temperature
        own = torch.arange(count, device=logits.device)
        total = cross_entropy(logits, own, reduction="sum")
        if self.options.symmetric:
            total = (total + cross_entropy(logits[:, :count].T, own, reduction="sum")) / 2
        hits = (logits.detach().argmax(dim=-1) == own).double().sum()
        cosines = (queries * passages).detach().double().sum()
        return LossOutput(sums={"infonce": total}, metrics={"found": (hits, count), "cosine": (cosines, count)})

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        return self.combine(*self.scores(policy, batch))

    def _pool(self, states: Tensor, batch: Batch) -> Tensor:
        """Return the embedding of each document, [D, H], from hidden states [T, H]."""
        if self.options.pooling == "last":
            return states[(batch.document_starts[1:] - 1).to(states.device)]
        return batch.sum_by_document(states) / batch.lengths.to(states)[:, None]
