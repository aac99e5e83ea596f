"""The head as the model calls it, for those that are no plain linear layer: statistics of whole chunks of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # [C, H] -> [C, V]


def statistics(logits: Tensor, labels: Tensor, want: tuple[str, ...]) -> Tensor:
    """Return [C, 1 + want]: the label's log-probability and what else is wanted, in float32 or better."""
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    total = logits.logsumexp(-1)
    columns = [logits.gather(-1, labels[:, None]).squeeze(-1) - total]
    for name in want:
        if name == "entropy":
            columns.append(total - (logits.softmax(-1) * logits).sum(-1))
        else:
            columns.append((logits.argmax(-1) == labels).to(logits.dtype))
    return torch.stack(columns, -1)


def head_trains(head: Head, rows: Tensor) -> bool:
    """Return True if a parameter that the head reaches requires a gradient."""
    with torch.enable_grad():
        return head(rows[:1].detach()).requires_grad


def score_chunks(head: Head, rows: Tensor, labels: Tensor, want: tuple[str, ...], spans: list[slice]) -> Tensor:
    """Return [S, 1 + want]; chunks are computed again in backward, but for one that is alone."""

    def compute(rows: Tensor, labels: Tensor) -> Tensor:
        return statistics(head(rows), labels, want)

    again = torch.is_grad_enabled() and len(spans) > 1
    chunks = [
        checkpoint(compute, rows[s], labels[s], use_reentrant=False) if again else compute(rows[s], labels[s])
        for s in spans
    ]
    return torch.cat(chunks)


class OwnPass(torch.autograd.Function):
    """The one-pass form for any frozen head: forward stores d log-probability / d hidden [S, H]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, labels: Tensor, want: tuple[str, ...], spans: list[slice]) -> Any:
        gradient, columns = torch.empty_like(hidden), []
        for span in spans:
            with torch.enable_grad():
                rows = hidden[span].detach().requires_grad_()
                scores = statistics(head(rows), labels[span], want)
                total = scores[:, 0].sum()
            (gradient[span],) = torch.autograd.grad(total, rows)
            columns.append(scores.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * factors[:, :1]).to(gradient.dtype), None, None, None, None
