"""Nested scales (QLoRA's double quantization, arXiv 2305.14314): the float32 scales of 4-bit blocks in 8 bits.

The scales [B] become codes [B] uint8 around their mean, the offset [] float32. Each block of 256 codes has a float32
scale [ceil(B / 256)]. The bytes are those of bitsandbytes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_kernels.fourbit.codebooks import dynamic_map

NESTED_BLOCK = 256
GRID = 65535  # bitsandbytes rounds to this grid over [-1, 1] first, then to the nearest value of the map


def nest_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes [B] uint8, the scales of their blocks [ceil(B / 256)] float32 and the offset [] float32.

    A code stands for the nearest value of the signed dynamic map. In a block of zeros it is 0, as in bitsandbytes.
    """
    offset = scales.mean()
    padded = F.pad(scales - offset, (0, -scales.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = padded.abs().amax(1)
    scaled = (padded * torch.where(nested > 0, 1.0 / nested, 0.0)[:, None]).clamp(-1, 1)
    # bitsandbytes is compiled to a fused multiply-add in float32: float64 holds the product exactly, then rounds once
    places = (((scaled + 1.0) * 0.5).double() * GRID + 0.5).float().int()
    codes = _nearest_codes(scales.device)[places].masked_fill(nested[:, None] == 0, 0)
    return codes.view(-1)[: scales.numel()].contiguous(), nested, offset


def unnest_scales(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """Return the scales [B] float32 that nested ones stand for."""
    factors = nested.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return dynamic_map(codes.device)[codes.int()] * factors + offset


@functools.cache
def _nearest_codes(device: torch.device) -> Tensor:
    """Return the code of each point of the grid, [65536] uint8."""
    values = dynamic_map(torch.device("cpu"))
    points = -1.0 + (2.0 * torch.arange(GRID + 1, dtype=torch.float32)) / GRID
    return torch.bucketize(points, 0.5 * (values[:-1] + values[1:])).to(torch.uint8).to(device)
