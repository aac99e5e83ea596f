"""Symmetric absmax int8: a weight as codes from -127 to 127 and one float32 scale for each group of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def quantize(weight: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Codes [out, in] int8 and scales [out, groups] float32 of a weight [out, in].

    A group is `group_size` neighbours in a row (None: the row); the last may be shorter. Its scale is its largest
    magnitude / 127, so no weight is further than absmax / 254 from its code times its scale. Quantizing what
    `dequantize` gives returns the same codes and scales, bit for bit.
    """
    weight = weight.detach().float()
    size = group_size or weight.shape[1]
    padded = F.pad(weight.abs(), (0, -weight.shape[1] % size))
    scales = padded.unflatten(1, (-1, size)).amax(-1) / 127
    steps = weight / _spread(scales.where(scales > 0, 1.0), weight.shape[1], size)  # a group of zeros keeps codes of 0
    return steps.round_().clamp_(-127, 127).to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor, group_size: int | None = None) -> Tensor:
    """The weight [out, in] in float32."""
    return codes * _spread(scales, codes.shape[1], group_size or codes.shape[1])


def _spread(scales: Tensor, columns: int, size: int) -> Tensor:
    """Scales [out, groups] as a factor of a weight with so many columns."""
    if scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(size, 1)[:, :columns]
