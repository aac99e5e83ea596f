"""Blocks of a bucket of documents: which queries meet which keys, their probabilities, and memory used again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import attrs
import torch
from torch import Tensor

from luthier.model.attention.document_masks import Bucket
from luthier.model.fake_tensors import standing_for

ROWS: Final = 128  # queries of one block
TILE: Final = 2**20  # scores of one tile, 4 MiB in float32


@attrs.frozen(kw_only=True)
class Rule:
    """Scores are scale * q k, then cap * tanh(score / cap); a window of w sees the token itself and w - 1 before it."""

    scale: float
    window: int | None = None
    cap: float | None = None


@attrs.frozen(kw_only=True)
class Block:
    """Queries [first, last) of each document in a bucket, keys [low, high) of it, and rows [a, b) of its heads."""

    first: int
    last: int
    low: int
    high: int
    a: int
    b: int


class Room:
    """Memory by purpose, used again for tile after tile: to map fresh pages would cost a fifth of the time."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """Whatever it holds, on the device of `like`."""
        size, buffer = math.prod(shape), self._held.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._held[name] = like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)


class Work:
    """One bucket's queries [N, g, L, d], keys and values [N, K + L, d]: N is documents times key heads, g the heads
    that share a key head, L the padded length, K the keys before their own that the documents attend to."""

    def __init__(self, bucket: Bucket, rule: Rule, query: Tensor, key: Tensor, value: Tensor, room: Room) -> None:
        self.bucket, self.rule, self.room, self.dtype = bucket, rule, room, value.dtype
        self.exact = torch.promote_types(torch.float32, value.dtype)
        self.groups = query.shape[1] // key.shape[1]
        self.q = self.queries(query, self.exact)
        self.k = self._gathered(key, self.exact, keys=True).flatten(0, 1)
        self.v = self._gathered(value, self.dtype, keys=True).flatten(0, 1)

    def queries(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [1, heads, T, d] as [N, g, L, d]."""
        batch = self._gathered(tensor, dtype, keys=False)
        return batch.view(-1, self.groups, *batch.shape[2:])

    def turns(self) -> Iterator[Block]:
        """Return the blocks one after another; without data only the largest, which stands for all."""
        return standing_for(self.q, list(self.blocks()), self.scores)

    def scores(self, block: Block) -> int:
        """Return the number of scores in a block."""
        return (block.b - block.a) * self.groups * (block.last - block.first) * (block.high - block.low)

    def blocks(self) -> Iterator[Block]:
        """Yield every query with the keys that it may see, in tiles that keep to TILE; the largest first, so that they
        fit the memory of the first.
        """
        known, window, heads = self.bucket.known, self.rule.window, len(self.q)
        for first in reversed(range(0, self.bucket.length, ROWS)):
            last = min(first + ROWS, self.bucket.length)
            low = 0 if window is None else max(known + first - window + 1, 0)
            size = heads * self.groups * (last - first) * (known + last - low)
            parts = min(math.ceil(size / TILE), heads)
            for i in range(parts):
                yield Block(first=first, last=last, low=low, high=known + last,
                            a=heads * i // parts, b=heads * (i + 1) // parts)  # fmt: skip

    def probabilities(self, block: Block) -> tuple[Tensor, Tensor | None]:
        """Return [n, g * rows, keys] in the exact dtype, and the slope of a soft cap."""
        q, k = self.rows(self.q, block), self.seen(self.k, block)
        scores = self.product("scores", q, k.transpose(1, 2), self.rule.scale)
        slope = None if self.rule.cap is None else self._capped(scores, self.rule.cap)
        self._mask(scores, block)
        return torch.ops.aten._softmax.out(scores, -1, False, out=scores), slope

    def rows(self, tensor: Tensor, block: Block) -> Tensor:
        """Return [n, g * rows, d], the block's queries out of [N, g, L, d]."""
        return tensor[block.a : block.b, :, block.first : block.last].flatten(1, 2)

    def seen(self, tensor: Tensor, block: Block) -> Tensor:
        """Return [n, keys, d], the block's keys out of [N, K + L, d]."""
        return tensor[block.a : block.b, block.low : block.high]

    def put(self, tensor: Tensor, block: Block, rows: Tensor) -> None:
        """Add rows back to where `rows` took them from."""
        place = tensor[block.a : block.b, :, block.first : block.last]
        place.copy_(rows.view(place.shape))

    def product(self, name: str, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """scale * left @ right, in memory of that name."""
        output = self.room.get(name, left, left.dtype, *left.shape[:2], right.shape[2])
        return torch.baddbmm(output, left, right, beta=0, alpha=scale, out=output)

    def rounded(self, name: str, exact: Tensor) -> Tensor:
        """Return the tensor in the inputs' dtype."""
        return exact if self.dtype == self.exact else self.room.get(name, exact, self.dtype, *exact.shape).copy_(exact)

    def by_document(self, tensor: Tensor) -> Tensor:
        """Return rows [N, ...] as padded documents [D, heads, length, d]."""
        return tensor.view(len(self.bucket.documents), -1, *tensor.shape[-2:])

    def _gathered(self, tensor: Tensor, dtype: torch.dtype, *, keys: bool) -> Tensor:
        """Return [D, heads, K + L, d] from [1, heads, T, d], with 0 where it is padded."""
        documents, length = self.bucket.documents, self.bucket.length + (self.bucket.known if keys else 0)
        batch = tensor.new_empty((len(documents), tensor.shape[1], length, tensor.shape[3]), dtype=dtype)
        for i, document in enumerate(documents):
            _copy(batch[i], tensor[0], document.spans if keys else ((document.start, document.stop),))
        return batch

    def _capped(self, scores: Tensor, cap: float) -> Tensor:
        """Caps scores in place; the slope of that. tanh(x) is 2 sigmoid(2 x) - 1, which is much faster on a CPU."""
        scores.mul_(2 / cap).sigmoid_().mul_(2).sub_(1)
        slope = self.room.get("slope", scores, self.exact, *scores.shape)
        torch.mul(scores, scores, out=slope).neg_().add_(1)
        scores.mul_(cap)
        return slope

    def _mask(self, scores: Tensor, block: Block) -> None:
        """-inf where a query does not see a key. Without a window that is above the diagonal of the last keys."""
        count, width = block.last - block.first, block.high - block.low
        heads = scores.view(len(scores), self.groups, count, width)
        if self.rule.window is None:
            heads[..., width - count :].add_(scores.new_full((count, count), -math.inf).triu_(1))
            return
        here = torch.arange(width - count, width, device=scores.device)[:, None]
        there = torch.arange(width, device=scores.device)
        heads.masked_fill_((there > here) | (there <= here - self.rule.window), -math.inf)


def _copy(target: Tensor, tensor: Tensor, spans: tuple[tuple[int, int], ...]) -> None:
    """Spans of [heads, T, d] beside each other into [heads, length, d], then 0."""
    place = 0
    for start, stop in spans:
        target[:, place : place + stop - start].copy_(tensor[:, start:stop])
        place += stop - start
    target[:, place:].zero_()
