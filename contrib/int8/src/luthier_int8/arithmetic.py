"""Symmetric absmax int8: codes from -127 to 127 and one float32 scale for each group of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def quantize(weight: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return codes [out, in] int8 and scales [out, groups] float32 of a weight [out, in].

    A group is `group_size` neighbours in a row (None: the whole row); the last one may be shorter. Its scale is its
    largest magnitude / 127, so that code * scale differs from the weight by at most absmax / 254. Quantizing the result
    of `dequantize` returns the same codes and scales, bit for bit.
    """
    weight = weight.detach().float()
    size = group_size or weight.shape[1]
    padded = F.pad(weight.abs(), (0, -weight.shape[1] % size))
    scales = padded.unflatten(1, (-1, size)).amax(-1) / 127
    steps = weight / _spread(
        scales.where(scales > 0, 1.0), weight.shape[1], size
    )  # not divided by 0: a group of zeros has codes of 0
    return steps.round_().clamp_(-127, 127).to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor, group_size: int | None = None) -> Tensor:
    """Return the weight [out, in] in float32."""
    return codes * _spread(scales, codes.shape[1], group_size or codes.shape[1])


def _spread(scales: Tensor, columns: int, size: int) -> Tensor:
    """Return scales [out, groups] repeated over the columns of their groups."""
    if scales.shape[1] == 1:
        return scales
    return scales.repeat_interleave(size, 1)[:, :columns]
