"""Sums and lengths of the answers of pairs, and their metrics under TRL's names."""

from __future__ import annotations

from typing import Final

import torch
from luthier import Batch
from torch import Tensor
from torch.nn.functional import logsigmoid

HIGHEST: Final = 30.0  # beyond it exp is continued by its tangent, so that its square is finite in float32


def sum_pairs(batch: Batch, values: Tensor) -> Tensor:
    """Return the sums of values [T] over the chosen and the rejected answer of each pair, [P, 2]."""
    return batch.sum_by_document(values)[batch.pairs.to(values.device)]


def count_pairs(batch: Batch, like: Tensor) -> Tensor:
    """Return the number of supervised tokens of each answer, at least 1, [P, 2] in the dtype of `like`."""
    ones = like.new_zeros(batch.num_tokens).index_fill(0, batch.supervised, 1.0)
    return sum_pairs(batch, ones).clamp(min=1.0)


def chosen_positions(batch: Batch) -> Tensor:
    """Return the positions of the supervised tokens of chosen answers, [S'] int64."""
    positions = batch.supervised
    owners = batch.document_ids()[positions]
    flags = owners.new_zeros(batch.num_documents).index_fill(0, batch.pairs[:, 0].to(owners.device), 1)
    return positions[flags[owners] > 0]


def smoothed_logistic(logits: Tensor, smoothing: float) -> Tensor:
    """Return -(1 - s) log sigmoid(x) - s log sigmoid(-x), the cost if a share s of pairs is labelled wrongly."""
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def bounded_expm1(values: Tensor) -> Tensor:
    """Return exp(x) - 1 up to x = 30, and its tangent at 30 beyond."""
    below = values.clamp(max=HIGHEST)
    return torch.expm1(below) + below.exp() * (values - below)


def describe_pairs(rewards: Tensor, logps: Tensor | None = None) -> dict[str, tuple[Tensor, float]]:
    """Return the metrics of rewards and log-probabilities [P, 2], as (sum, count). A tie counts as inaccurate."""
    count, rewards = float(len(rewards)), rewards.detach().double()
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = {
        "rewards/chosen": (rewards[:, 0].sum(), count),
        "rewards/rejected": (rewards[:, 1].sum(), count),
        "rewards/accuracies": ((margins > 0).double().sum(), count),
        "rewards/margins": (margins.sum(), count),
    }
    if logps is not None:
        metrics["logps/chosen"], metrics["logps/rejected"] = ((side.double().sum(), count) for side in logps.detach().T)
    return metrics
