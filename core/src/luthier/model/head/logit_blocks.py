"""One block of tokens through a linear head: statistics, and gradients in one pass or from logits computed again.

S supervised positions, H hidden, V vocabulary, C rows of a block, n columns of a tile. With p the softmax and y the
label, d log p_y / d logit_j is [j = y] - p_j, and d entropy / d logit_j is -p_j (log p_j + entropy).
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from luthier.model.head.online import Online
from luthier.model.head.tiles import Linear, Tile, Tiles

Spread = tuple[Tensor, Tensor]  # [C] entropies, and the gradient with respect to them


@attrs.frozen(kw_only=True, eq=False)
class Kept:
    """A tile whose weight gradient is due: its part, [C, n] its own softmax with 0 at labels, [C] its log-sum-exp."""

    part: slice
    own: Tensor
    norm: Tensor


class Sums:
    """Gradients of a head's weight [V, H] and bias [V], summed in float32 or better; None for one that is frozen.

    The first block is written, the others are added: large memory is not filled with zeros before.
    """

    def __init__(self, head: Linear, *, weight: bool, bias: bool) -> None:
        self.head, self._written = head, False
        vocabulary, hidden = head.weight.shape
        self.weight = head.weight.new_empty(vocabulary, hidden, dtype=head.exact) if weight else None
        self.bias = head.weight.new_empty(vocabulary, dtype=head.exact) if bias else None

    def given(self, number: float = 1.0) -> tuple[Tensor | None, Tensor | None]:
        """Both times a number, in the dtypes that the parameters' gradients are kept in."""
        pairs = ((self.weight, self.head.weight), (self.bias, self.head.bias))
        weight, bias = (
            None if sums is None or parameter is None else sums.mul_(number).to(_gradient_dtype(parameter))
            for sums, parameter in pairs
        )
        return weight, bias

    def end_block(self) -> None:
        self._written = True

    def add_labels(self, labels: Tensor, rows: Tensor, factors: Tensor) -> None:
        """Add the labels' own terms, rows [C, H] times factors [C], after all tiles."""
        if self.weight is not None:
            self.weight.index_put_((labels,), rows * factors[:, None], accumulate=True)
        if self.bias is not None:
            self.bias.index_put_((labels,), factors, accumulate=True)

    def add_kept(self, tile: Kept, rows: Tensor, factors: Tensor) -> None:
        """Add a kept tile, with each of its rows times a factor."""
        if self.weight is not None:
            self._add(self.weight[tile.part], tile.own.t() @ (rows * factors[:, None]).to(tile.own.dtype))
        if self.bias is not None:
            self._add(self.bias[tile.part], tile.own.t() @ factors.to(tile.own.dtype))

    def add(self, tile: Tile, slopes: Tensor, rounded: Tensor, rows: Tensor) -> None:
        """Gradients [C, n] of a tile's products, also in the head's dtype."""
        if self.bias is not None:
            self._add(self.bias[tile.part], slopes.sum(0))
        if self.weight is not None:
            self._add(self.weight[tile.part], rounded.t() @ rows)

    def _add(self, sums: Tensor, part: Tensor) -> None:
        sums.add_(part) if self._written else sums.copy_(part)


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return that of a parameter's gradient, which pure_bf16 keeps in float32."""
    own = getattr(parameter, "grad_dtype", None) if parameter.is_leaf else None
    return own or parameter.dtype


def score_block(tiles: Tiles, rows: Tensor, labels: Tensor, online: Online) -> Online:
    """Compute the statistics of one block into `online`, without gradient."""
    for tile in tiles.each(rows, labels):
        online.fold(tile, tiles)
    return online


def differentiate_block(
    tiles: Tiles, rows: Tensor, labels: Tensor, online: Online
) -> tuple[Tensor, Tensor, list[Kept]]:
    """Compute the statistics of one block into `online`, and return [C, H] the gradient of its log-probabilities, [C]
    the part

    A label's own term is left out of the tiles, and added once its probability is known: where a model is sure, what
    remains of 1 - p would be lost in the rounding of bfloat16.
    """
    head, saved_tiles = tiles.head, []
    total = head.sums(*rows.shape)
    for tile in tiles.each(rows, labels):
        own, norm = online.fold(tile, tiles)
        own[tile.at] = 0.0
        if tile.slope is not None:
            own.mul_(tile.slope)
        rounded = tile.rounded(own)
        product = (rounded @ tile.weight).to(total.dtype)
        total.mul_(online.kept[:, None]).addcmul_(product, (norm - online.total).exp_()[:, None])
        if tiles.keep:
            saved_tiles.append(Kept(part=tile.part, own=rounded, norm=norm))
    rest = -torch.expm1(online.logprobs)
    if tiles.curved:
        rest *= head.curve.slope(online.label, torch.empty_like(rest))
    labelled = head.weight[labels].to(head.dtype).to(total.dtype)
    return labelled.mul_(rest[:, None]).sub_(total).mul_(head.curve.scale), rest, saved_tiles


def collect_gradients(sums: Sums, rows: Tensor, labels: Tensor, online: Online, rest: Tensor, tiles: list[Kept],
                      factors: Tensor) -> None:  # fmt: skip
    """Add the parameters' gradients of sum over C of factor * log-probability, from what `differentiate_block` kept."""
    for tile in tiles:
        sums.add_kept(tile, rows, -factors * (tile.norm - online.total).exp())
    sums.add_labels(labels, rows, factors * rest)
    sums.end_block()


def recompute_gradient(tiles: Tiles, rows: Tensor, labels: Tensor, norms: Tensor, factors: Tensor,
                       spread: Spread | None, sums: Sums) -> Tensor:  # fmt: skip
    """Return [C, H] the gradient of rows from logits computed again, and the parameters' into `sums`.

    `norms` are log-sum-exps [C], `factors` [C] the gradient that came for the log-probabilities.
    """
    total, scale = tiles.head.sums(*rows.shape), tiles.head.curve.scale
    for tile in tiles.each(rows, labels):
        slopes = _slopes(tile.logits.sub_(norms[:, None]), factors, spread)
        slopes[tile.at] += factors[tile.at[0]]
        if tile.slope is not None:
            slopes.mul_(tile.slope)
        if scale != 1.0:
            slopes.mul_(scale)
        rounded = tile.rounded(slopes)
        total.add_(rounded @ tile.weight)
        sums.add(tile, slopes, rounded, rows)
    sums.end_block()
    return total


def _slopes(logs: Tensor, factors: Tensor, spread: Spread | None) -> Tensor:
    """Return [C, n], the gradient of the logits without the labels' own terms, in the memory of log p."""
    if spread is None:
        return logs.exp_().mul_(-factors[:, None])
    entropies, weights = spread
    bends = logs * -weights[:, None] - (factors + weights * entropies)[:, None]
    return logs.exp_().mul_(bends)
