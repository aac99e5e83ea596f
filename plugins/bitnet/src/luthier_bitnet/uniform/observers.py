"""Choose the range that levels cover: all values, all but outliers, or the best by squared error or KL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import torch
from torch import Tensor

if TYPE_CHECKING:
    from luthier_bitnet.uniform.grid import Levels

SHARES: Final = (
    0.15,
    0.25,
    0.35,
    0.45,
    0.55,
    0.65,
    0.75,
    0.85,
    0.95,
)  # shares of the whole range, from which `mse` and `kl` choose
BINS: Final = 512


@attrs.frozen(kw_only=True)
class Range:
    """The lowest and highest value of each row, [..., 1] each."""

    low: Tensor
    high: Tensor

    def narrowed(self, share: float) -> Range:
        return Range(low=self.low * share, high=self.high * share)


@torch.no_grad()
def observe(values: Tensor, levels: Levels, observer: str, percentile: float = 99.9) -> Range:
    """Return a range for each row of values [..., count]."""
    if levels.signs:  # the level of the sign that has the least squared error
        mean = values.abs().mean(-1, keepdim=True)
        return Range(low=-mean, high=mean)
    whole = Range(low=values.amin(-1, keepdim=True), high=values.amax(-1, keepdim=True))
    if observer == "minmax":
        return whole
    if observer == "percentile":
        return _percentile(values, percentile)
    measured = squared_error if observer == "mse" else divergence
    best, least = whole, measured(values, whole, levels)
    for share in SHARES:
        tried = whole.narrowed(share)
        error = measured(values, tried, levels)
        better = error < least
        least = torch.where(better, error, least)
        best = Range(low=torch.where(better, tried.low, best.low), high=torch.where(better, tried.high, best.high))
    return best


def squared_error(values: Tensor, around: Range, levels: Levels) -> Tensor:
    """Return the mean squared error of each row, [..., 1]."""
    scale, zero = levels.lay(around)
    read = (levels.encode(values / scale + zero) - zero) * scale
    return (read - values).square().mean(-1, keepdim=True)


def divergence(values: Tensor, around: Range, levels: Levels) -> Tensor:
    """Return the KL divergence from the histogram of each row to that of its quantized values, [..., 1].

    The values of a level are spread evenly over those bins of its step that hold any.
    """
    scale, zero = levels.lay(around)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    width = ((high - low) / BINS).clamp(min=1e-12)
    shares = _histogram(values, low, width)
    middles = low + width * (torch.arange(BINS, device=values.device, dtype=values.dtype) + 0.5)
    codes = (levels.encode(middles / scale + zero) - levels.low).long()
    count = levels.high - levels.low + 1
    filled = (shares > 0).to(shares.dtype)
    masses, bins = (torch.zeros(*shares.shape[:-1], count, dtype=shares.dtype, device=shares.device) for _ in range(2))
    masses.scatter_add_(-1, codes, shares)
    bins.scatter_add_(-1, codes, filled)
    quantized_shares = (masses / bins.clamp(min=1)).gather(-1, codes)
    return (shares * (shares.clamp(min=1e-12) / quantized_shares.clamp(min=1e-12)).log() * filled).sum(-1, keepdim=True)


def _histogram(values: Tensor, low: Tensor, width: Tensor) -> Tensor:
    """Return the share of values in each of `BINS` bins, [..., BINS]."""
    bins = ((values - low) / width).long().clamp(0, BINS - 1)
    counts = torch.zeros(*values.shape[:-1], BINS, dtype=values.dtype, device=values.device)
    counts.scatter_add_(-1, bins, torch.ones_like(values))
    return counts / values.shape[-1]


def _percentile(values: Tensor, percentile: float) -> Range:
    """Return the central range that holds this percentage of the values."""
    ordered = values.sort(-1).values
    out = int((1 - percentile / 100) / 2 * (values.shape[-1] - 1) + 0.5)
    return Range(low=ordered[..., out : out + 1], high=ordered[..., values.shape[-1] - 1 - out :][..., :1])
