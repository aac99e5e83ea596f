"""Tiles: a linear head's logits for some tokens and a part of the vocabulary, in memory that is used again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import attrs
import torch
from torch import Tensor

ROWS: Final = 1024  # tokens of one block
TILE: Final = {"cpu": 2**21, "cuda": 2**26}  # logits of one tile: 8 MiB in float32 on a CPU, which fit in its caches
NARROWEST: Final = 1024  # the fewest columns of a tile


@attrs.frozen(kw_only=True)
class Curve:
    """The function of a head on h W^T + b: times `scale`, then cap * tanh(logit / cap) if it has a soft cap."""

    scale: float = 1.0
    cap: float | None = None

    def bend_(self, products: Tensor) -> Tensor:
        """Turn products [C, n] = h W^T + b into logits, in place."""
        # tanh(x) is 2 sigmoid(2 x) - 1, which is six times as fast on a CPU
        if self.cap is None:
            return products if self.scale == 1.0 else products.mul_(self.scale)
        return products.mul_(2 * self.scale / self.cap).sigmoid_().mul_(2 * self.cap).sub_(self.cap)

    def slope(self, logits: Tensor, out: Tensor) -> Tensor:
        """d logit / d (scale * product) of a soft cap."""
        assert self.cap is not None
        return torch.mul(logits, 1 / self.cap, out=out).square_().neg_().add_(1.0)


@attrs.frozen(kw_only=True, eq=False)
class Linear:
    """A head's weight [V, H] and bias [V], how it bends their product, and the dtype that it computes products in."""

    weight: Tensor
    bias: Tensor | None
    curve: Curve
    dtype: torch.dtype

    @property
    def exact(self) -> torch.dtype:
        """Return the dtype of statistics and sums: float32 or better."""
        return torch.promote_types(torch.float32, self.dtype)

    def sums(self, *shape: int) -> Tensor:
        """Zeros in that dtype."""
        return torch.zeros(shape, dtype=self.exact, device=self.weight.device)


@attrs.define(kw_only=True, eq=False)
class Tile:
    """Logits [C, n] of some rows for a part of the vocabulary, and what they were made with.

    `at` are row and column of the labels that lie in it; `slope` [C, n] is that of a soft cap. `products` is memory
    in the head's dtype, the logits' own where that is exact.
    """

    part: slice
    weight: Tensor  # [n, H] in the head's dtype
    products: Tensor  # [C, n]
    logits: Tensor
    at: tuple[Tensor, Tensor]
    slope: Tensor | None

    def rounded(self, values: Tensor) -> Tensor:
        """Return memory [C, n] in the head's dtype, for its products."""
        return values if values.dtype == self.products.dtype else self.products.copy_(values)


class Tiles:
    """The tiles of one block of rows after the other. Fresh memory for each would cost a tenth of the time again."""

    def __init__(self, head: Linear, rows: int, *, keep: bool = False, curved: bool = True) -> None:
        """For blocks of at most `rows`; `keep`: the products of all parts of a block stay beside each other."""
        self.head, self.keep, self.curved = head, keep, curved and head.curve.cap is not None
        self.parts = columns(head.weight.shape[0], rows, head.weight.device.type)
        self.room: dict[str, Tensor] = {}
        self.rows, self.widest = rows, max(p.stop - p.start for p in self.parts)

    def each(self, rows: Tensor, labels: Tensor) -> Iterator[Tile]:
        """Yield the logits of a block, rows [C, H] and labels [C], part by part."""
        head = self.head
        for part in self.parts:
            shape = (rows.shape[0], part.stop - part.start)
            weight = head.weight[part].to(head.dtype)
            products = torch.mm(rows, weight.t(), out=self._products(part, shape))
            logits = products if head.dtype == head.exact else self.memory("logits", shape).copy_(products)
            if head.bias is not None:
                logits.add_(head.bias[part])
            head.curve.bend_(logits)
            slope = head.curve.slope(logits, self.memory("slope", shape)) if self.curved else None
            yield Tile(part=part, weight=weight, products=products, logits=logits, at=places(labels, part), slope=slope)

    def memory(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Return memory [C, n] for one purpose, in the exact dtype."""
        if name not in self.room:
            self.room[name] = self.head.weight.new_empty(self.rows * self.widest, dtype=self.head.exact)
        return self.room[name][: shape[0] * shape[1]].view(shape)

    def _products(self, part: slice, shape: tuple[int, int]) -> Tensor:
        if "products" not in self.room:
            columns_held = self.head.weight.shape[0] if self.keep else self.widest
            self.room["products"] = self.head.weight.new_empty(self.rows * columns_held, dtype=self.head.dtype)
        first = part.start * shape[0] if self.keep else 0
        return self.room["products"][first : first + shape[0] * shape[1]].view(shape)


def cut_blocks(count: int, most: int) -> list[slice]:
    """0 to `count` in slices of about equal size, none longer than `most`; of 0 one that is empty."""
    pieces = max(math.ceil(count / most), 1)
    return [slice(count * i // pieces, count * (i + 1) // pieces) for i in range(pieces)]


def columns(vocabulary: int, rows: int, kind: str) -> list[slice]:
    """Return the vocabulary in parts whose tiles of `rows` tokens do not exceed TILE."""
    return cut_blocks(vocabulary, max(TILE.get(kind, TILE["cuda"]) // max(rows, 1), NARROWEST))


def places(labels: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Row and column in the tile of the labels that lie in a part of the vocabulary."""
    rows = ((labels >= part.start) & (labels < part.stop)).nonzero().squeeze(1)
    return rows, labels[rows] - part.start
