"""Divergences [C] of two distributions, from their log-probabilities [C, K]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return KL(teacher || student)."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return KL(student || teacher)."""
    return (student.exp() * (student - teacher)).sum(-1)


def mixed_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student."""
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * forward_kl(mixture, teacher, beta) + (1 - beta) * forward_kl(mixture, student, beta)


def likeliest(student: Tensor, teacher: Tensor, count: int, add_tail: bool) -> tuple[Tensor, Tensor]:
    """Return both over the teacher's `count` most likely tokens, [C, count], and the tail as one more token."""
    if count >= teacher.shape[-1]:
        return student, teacher
    places = teacher.topk(count, dim=-1).indices
    return _choose(student, places, add_tail), _choose(teacher, places, add_tail)


def _choose(logprobs: Tensor, places: Tensor, add_tail: bool) -> Tensor:
    chosen = logprobs.gather(-1, places)
    if not add_tail:
        return chosen.log_softmax(-1)
    others = logprobs.scatter(-1, places, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, others], dim=-1)


DIVERGENCES: Final[dict[str, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": mixed_divergence,
}
