"""Attention on a CPU: blocks of queries against all keys they may see, as batched products over heads and documents.

Scores and their softmax are float32 or better, products with probabilities in the inputs' dtype. In bfloat16 training
this takes half the time of torch's own CPU kernel called for each document; and windows, soft caps and documents that
continue others need no mask of a whole row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.model.attention.document_masks import Bucket
from luthier.model.attention.score_blocks import Block, Room, Rule, Work
from luthier.model.fake_tensors import is_shortened

SHORT: Final = 4  # documents of up to so many head dimensions keep their probabilities for the backward pass


class Products(torch.autograd.Function):
    """Attention [1, T, heads, d] of q [1, heads, T, d] and k, v [1, key heads, T, d] over buckets of documents."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: tuple[Bucket, ...], rule: Rule,
                keep: bool) -> Tensor:  # fmt: skip
        """Return True (`keep`) if a gradient will be asked for."""
        ctx.plan, ctx.rule, ctx.counts, probabilities = plan, rule, [], []
        result, room = value.new_empty((1, query.shape[2], query.shape[1], value.shape[3])), Room()
        for bucket in plan:
            work = Work(bucket, rule, query, key, value, room)
            own = _attended(work, result[0], keep and _keeps(work))
            ctx.counts.append(len(own))
            probabilities += own
        ctx.save_for_backward(query, key, value, *probabilities)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> Any:
        query, key, value, *probabilities = ctx.saved_tensors
        room, left = Room(), iter(probabilities)
        sums = Gradients(query, key, value, shared=any(bucket.known for bucket in ctx.plan))
        for bucket, count in zip(ctx.plan, ctx.counts, strict=True):
            work, own = Work(bucket, ctx.rule, query, key, value, room), list(islice(left, count))
            _differentiated(work, given.transpose(1, 2), sums, iter(own) if own else None)
        return *sums.given(), None, None, None


class Gradients:
    """Of query, key and value, [T, heads, d] each in memory; where documents are `shared`, sums in the exact dtype."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, *, shared: bool) -> None:
        self.shared, self.dtype = shared, value.dtype
        exact = torch.promote_types(torch.float32, value.dtype) if shared else value.dtype
        self.query = value.new_empty((query.shape[2], query.shape[1], query.shape[3]))
        self.key = value.new_zeros((key.shape[2], key.shape[1], key.shape[3]), dtype=exact)
        self.value = value.new_zeros((value.shape[2], value.shape[1], value.shape[3]), dtype=exact)

    def given(self) -> Iterator[Tensor]:
        """Yield [1, heads, T, d] each."""
        for gradient in (self.query, self.key, self.value):
            yield gradient.to(self.dtype).transpose(0, 1)[None]

    def put(self, bucket: Bucket, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Put the bucket's tensors into place: query [D, heads, L, d], key and value [D, key heads, K + L, d]."""
        for i, document in enumerate(bucket.documents):
            own = slice(document.start, document.stop)
            self.query[own].copy_(query[i, :, : document.length].transpose(0, 1))
            place = 0
            for start, stop in document.spans:
                there = slice(place, place + stop - start)
                self._add(self.key[start:stop], key[i, :, there])
                self._add(self.value[start:stop], value[i, :, there])
                place = there.stop

    def _add(self, sums: Tensor, part: Tensor) -> None:
        moved = part.transpose(0, 1)
        sums.add_(moved) if self.shared else sums.copy_(moved)


def _keeps(work: Work) -> bool:
    """Return True if a bucket's probabilities are kept: short documents have fewer than the layer keeps anyway."""
    return work.rule.cap is None and work.k.shape[1] <= SHORT * work.q.shape[-1]


def _attended(work: Work, result: Tensor, keep: bool) -> list[Tensor]:
    """Put a bucket's attention into result [T, heads, d]; its probabilities where they are to be kept."""
    probabilities = []
    mixed = work.room.get("mixed", work.v, work.dtype, *work.q.shape[:3], work.v.shape[-1])
    for block in work.turns():
        exact, _ = work.probabilities(block)
        share = exact.to(work.dtype, copy=True) if keep else work.rounded("share", exact)
        work.put(mixed, block, work.product("rows", share, work.seen(work.v, block)))
        if keep:
            probabilities.append(share)
    if keep and is_shortened(work.q):  # counts what the blocks that this one stands for would keep
        probabilities.append(share.new_empty(sum(map(work.scores, work.blocks())) - share.numel()))
    documents = work.bucket.documents
    for own, document in zip(work.by_document(mixed), documents, strict=True):
        result[document.start : document.stop].copy_(own[:, : document.length].transpose(0, 1))
    return probabilities


def _differentiated(work: Work, given: Tensor, sums: Gradients, blocks: Iterator[Tensor] | None) -> None:
    """Add a bucket's gradients: with p the probabilities, d score = p * (d p - sum over keys of p * d p)."""
    given = work.queries(given, work.dtype)
    q, k, scale = work.q.to(work.dtype), work.k.to(work.dtype), work.rule.scale
    queries = work.room.get("queries", q, work.dtype, *q.shape)
    keys = work.room.get("keys", k, work.exact, *k.shape).zero_()
    values = work.room.get("values", k, work.exact, *work.v.shape).zero_()
    for block in work.turns():
        exact, share, cap_slope = _shares(work, block, blocks)
        rows = work.rows(given, block)
        work.seen(values, block).add_(work.product("columns", share.transpose(1, 2), rows))
        slopes = work.product("slopes", rows, work.seen(work.v, block).transpose(1, 2))
        scores = _score_gradient(work, exact, slopes, cap_slope)
        work.put(queries, block, work.product("rows", scores, work.seen(k, block), scale))
        work.seen(keys, block).add_(work.product("columns", scores.transpose(1, 2), work.rows(q, block), scale))
    sums.put(work.bucket, work.by_document(queries), work.by_document(keys), work.by_document(values))


def _shares(work: Work, block: Block, blocks: Iterator[Tensor] | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the probabilities in the exact dtype and the inputs', kept or computed again, and a soft cap's slope."""
    if blocks is None:
        exact, slope = work.probabilities(block)
        return exact, work.rounded("share", exact), slope
    share = next(blocks)
    if share.dtype == work.exact:
        return share, share, None
    return work.room.get("scores", share, work.exact, *share.shape).copy_(share), share, None


def _score_gradient(work: Work, shares: Tensor, slopes: Tensor, cap_slope: Tensor | None) -> Tensor:
    """Return [n, g * rows, keys] the gradient of the scores from that of the probabilities, in the inputs' dtype."""
    exact = slopes
    if slopes.dtype != work.exact:
        exact = work.room.get("exact slopes", slopes, work.exact, *slopes.shape).copy_(slopes)
    torch.ops.aten._softmax_backward_data.out(exact, shares, -1, work.exact, grad_input=exact)
    if cap_slope is not None:
        exact.mul_(cap_slope)
    return exact if exact is slopes else slopes.copy_(exact)
