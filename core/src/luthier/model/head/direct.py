"""Label log-probabilities of a linear head as autograd functions: one pass, gradient in forward, and recompute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.errors import LuthierError
from luthier.model.head.logit_blocks import (
    Sums,
    collect_gradients,
    differentiate_block,
    recompute_gradient,
    score_block,
)
from luthier.model.head.online import Online
from luthier.model.head.tiles import ROWS, Linear, Tiles, cut_blocks

Want = tuple[str, ...]
Scores = tuple[Tensor, "Tensor | None", "Tensor | None"]  # [S] log-probabilities, entropies, top-1 hits
# bytes of probabilities that may always be kept for the weight's gradient, even if that is smaller
SMALL: Final = 2**25


def sweep(head: Linear, count: int, want: Want, *, most: int | None = None, keep: bool = False) -> Iterator[
    tuple[slice, Tiles, Online]]:  # fmt: skip
    """Blocks of `count` rows, each with memory for its tiles and what is to hold its statistics."""
    spans = cut_blocks(count, most or ROWS)
    tiles = Tiles(head, max(s.stop - s.start for s in spans), keep=keep)
    for span in spans:
        yield span, tiles, Online(head.sums(span.stop - span.start), want)


def joined(parts: list[Online]) -> Scores:
    """Return the statistics of all blocks."""
    entropies = [p.entropy for p in parts if p.entropy is not None]
    hits = [p.top1 for p in parts if p.top1 is not None]
    logprobs = torch.cat([p.logprobs for p in parts])
    return logprobs, torch.cat(entropies) if entropies else None, torch.cat(hits) if hits else None


@torch.no_grad()
def score_labels(head: Linear, hidden: Tensor, labels: Tensor, want: Want) -> Scores:
    """Without gradient."""
    rows, parts = hidden.to(head.dtype), []
    for span, tiles, online in sweep(head, len(labels), want):
        parts.append(score_block(tiles, rows[span], labels[span], online))
    return joined(parts)


class OnePass(torch.autograd.Function):
    """For a frozen head: forward stores d log-probability / d hidden [S, H], and backward scales its rows.

    Exact for every loss, since a token's log-probability depends on its own row alone. The entropies' gradient is
    computed in backward, if one comes.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Linear, labels: Tensor, want: Want) -> Scores:
        ctx.set_materialize_grads(False)
        rows, parts = hidden.to(head.dtype), []
        gradient = torch.empty_like(rows)
        for span, tiles, online in sweep(head, len(labels), want):
            gradient[span] = differentiate_block(tiles, rows[span], labels[span], online)[0]
            parts.append(online)
        scores = joined(parts)
        ctx.head, ctx.kind = head, hidden.dtype
        again_too = (rows, labels, norms_of(parts), scores[1]) if scores[1] is not None else ()
        ctx.save_for_backward(gradient, *again_too)
        return marked(ctx, scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor | None, spread: Tensor | None, _: None) -> Any:
        gradient, *saved = ctx.saved_tensors
        hidden_grad = gradient.new_zeros(gradient.shape, dtype=ctx.kind)
        if factors is not None:
            torch.mul(gradient, factors[:, None], out=hidden_grad)
        if spread is not None:
            hidden_grad += _repeated(ctx.head, saved, None, spread, Sums(ctx.head, weight=False, bias=False))
        return hidden_grad, None, None, None


class Recompute(torch.autograd.Function):
    """For a head that trains under any loss: forward keeps [S] norms, and backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Linear, labels: Tensor,
                want: Want) -> Scores:  # fmt: skip
        ctx.set_materialize_grads(False)
        rows = hidden.to(head.dtype)
        parts = [score_block(tiles, rows[s], labels[s], online) for s, tiles, online in sweep(head, len(labels), want)]
        scores = joined(parts)
        ctx.head, ctx.kind = head, hidden.dtype
        ctx.save_for_backward(rows, labels, norms_of(parts), scores[1])
        return marked(ctx, scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor | None, spread: Tensor | None, _: None) -> Any:
        sums = Sums(ctx.head, weight=ctx.needs_input_grad[1], bias=ctx.needs_input_grad[2])
        hidden_grad = _repeated(ctx.head, ctx.saved_tensors, factors, spread, sums)
        return hidden_grad.to(ctx.kind), *sums.given(), None, None, None


class InForward(torch.autograd.Function):
    """For a head that trains under a loss that knows its coefficients: every gradient is made in forward.

    Backward multiplies by the one number that it does not know then. Three products, where recompute takes four.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Linear, labels: Tensor,
                want: Want, coefficients: Tensor) -> Scores:  # fmt: skip
        ctx.set_materialize_grads(False)
        rows, parts = hidden.to(head.dtype), []
        gradient = torch.empty_like(hidden)
        sums = Sums(head, weight=ctx.needs_input_grad[1], bias=ctx.needs_input_grad[2])
        for span, tiles, online in sweep(head, len(labels), want, most=affordable(head), keep=True):
            own, rest, tiles_kept = differentiate_block(tiles, rows[span], labels[span], online)
            gradient[span] = own.mul_(coefficients[span, None])
            factors = coefficients[span] * head.curve.scale
            collect_gradients(sums, rows[span], labels[span], online, rest, tiles_kept, factors)
            parts.append(online)
        ctx.save_for_backward(coefficients)
        ctx.found = (gradient, sums)
        return marked(ctx, joined(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor | None, spread: Tensor | None, _: None) -> Any:
        (coefficients,) = ctx.saved_tensors
        number = multiple(factors, coefficients)
        # not kept here, so that autograd may take the tensors over without a copy
        (gradient, sums), ctx.found = ctx.found, None
        return gradient.mul_(number), *sums.given(number), None, None, None, None


def affordable(head: Linear) -> int:
    """Return the rows whose probabilities may be kept: a quarter of what the weight's gradient takes, or SMALL."""
    vocabulary, hidden = head.weight.shape
    room = max(SMALL, vocabulary * hidden * head.exact.itemsize // 4)
    return min(max(room // (vocabulary * head.dtype.itemsize), 1), ROWS)


def multiple(factors: Tensor | None, coefficients: Tensor) -> float:
    """Return the factor from the declared coefficients to the gradient that came. Raises if there is none."""
    if factors is None or not len(coefficients):
        return 0.0
    place = coefficients.abs().argmax(0, keepdim=True)
    largest = coefficients.gather(0, place)
    number = torch.where(largest == 0, 0.0, factors.gather(0, place) / largest)
    if bool(((factors - number * coefficients).abs() > 1e-5 * (number * largest).abs()).any()):
        problem = "its gradient by the log-probabilities is not a multiple of what coefficients(batch) declares"
        remedy = "Correct coefficients(batch), or return None."
        raise LuthierError("part-invalid", problem, where="loss", remedy=remedy)
    return float(number)


def norms_of(parts: list[Online]) -> Tensor:
    """Return [S] log-sum-exp."""
    return torch.cat([p.total for p in parts])


def marked(ctx: Any, scores: Scores) -> Scores:
    """Hits have no gradient."""
    if scores[2] is not None:
        ctx.mark_non_differentiable(scores[2])
    return scores


def _repeated(head: Linear, saved: Sequence[Any], factors: Tensor | None, spread: Tensor | None, sums: Sums) -> Tensor:
    """Return [S, H] from logits computed again, by block; `saved` are rows, labels, norms, and entropies or None."""
    rows, labels, norms, entropies = saved
    gradient = norms.new_empty(rows.shape)
    factors = torch.zeros_like(norms) if factors is None else factors
    for span, tiles, _ in sweep(head, len(labels), ()):
        entropy = None if spread is None or entropies is None else (entropies[span], spread[span])
        gradient[span] = recompute_gradient(tiles, rows[span], labels[span], norms[span], factors[span], entropy, sums)
    return gradient
