"""The softmax over a vocabulary that comes in parts (Milakov and Gimelshein 2018, arXiv 1805.02867)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luthier.model.head.tiles import Tile, Tiles

COPIED = 64  # rows whose logits are copied at a time to look for ties, however many labels lead


class Online:
    """Statistics of [C] rows. `total` is the log of the sum of exponentials so far, `label` the label's logit."""

    def __init__(self, like: Tensor, want: tuple[str, ...] = ()) -> None:
        """`like` gives size, dtype and device; `want` names what is kept beside log-probabilities."""
        self.total = torch.full_like(like, -math.inf)
        self.kept = torch.zeros_like(like)  # the share of the softmax that earlier tiles have so far
        self.label = torch.zeros_like(like)
        self.mean = torch.zeros_like(like) if "entropy" in want else None  # the expected logit
        self.best = torch.full_like(like, -math.inf) if "top1" in want else None
        self.rival = torch.full_like(like, -math.inf)  # the largest logit at a smaller index than the label

    def fold(self, tile: Tile, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """Take in a tile: [C, n] its own softmax, in the logits' memory where that can be, and [C] its log-sum-exp."""
        logits = tile.logits
        peak = logits.amax(1)
        self.label[tile.at[0]] = logits[tile.at]
        if self.best is not None:
            self._compare(tile, peak)
        place = logits if self.mean is None else tiles.memory("own", logits.shape)  # type: ignore[arg-type]
        own = torch.ops.aten._softmax.out(logits, 1, False, out=place)
        norm = peak - own.amax(1).log()  # the largest probability is exp(peak - norm)
        before, self.total = self.total, torch.logaddexp(self.total, norm)
        self.kept = (before - self.total).exp_()
        if self.mean is not None:
            self.mean = self.mean * self.kept + (norm - self.total).exp_() * logits.mul_(own).sum(1)
        return own, norm

    def _compare(self, tile: Tile, peak: Tensor) -> None:
        """Only where the label is a most likely token so far, others may tie with it, and their logits are copied."""
        assert self.best is not None
        rows, places = tile.at
        leading = self.label[rows] >= torch.maximum(self.best[rows], peak[rows])
        columns = torch.arange(tile.logits.shape[1], device=peak.device)
        for some, at in zip(rows[leading].split(COPIED), places[leading].split(COPIED), strict=True):
            within = tile.logits[some].masked_fill_(columns >= at[:, None], -math.inf).amax(1)
            self.rival[some] = torch.maximum(self.best[some], within)
        self.best = torch.maximum(self.best, peak)

    @property
    def logprobs(self) -> Tensor:
        return self.label - self.total

    @property
    def entropy(self) -> Tensor | None:
        return None if self.mean is None else self.total - self.mean

    @property
    def top1(self) -> Tensor | None:
        """1 where the label is the first of the most likely tokens."""
        if self.best is None:
            return None
        return ((self.label >= self.best) & (self.label > self.rival)).to(self.label.dtype)
