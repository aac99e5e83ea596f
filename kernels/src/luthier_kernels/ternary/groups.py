"""Granularity: which weights share a scale, and where that scale is."""

from __future__ import annotations

import torch
from torch import Tensor

TENSOR, ROW = -1, 0  # in place of a group's size


def check_granularity(granularity: str | int) -> int:
    """Return -1 for `tensor`, 0 for `row`, or the size of a group; ValueError for anything else."""
    named = {"tensor": TENSOR, "row": ROW}
    if isinstance(granularity, str) and granularity in named:
        return named[granularity]
    if isinstance(granularity, int) and granularity > 0:
        return granularity
    raise ValueError(f"granularity: expected 'tensor', 'row' or the size of a group, at least 1, got {granularity!r}")


def group_width(group: int, columns: int) -> int:
    """Return the number of columns of a row that share a scale."""
    return group if group > 0 else max(columns, 1)


def scales_shape(rows: int, columns: int, group: int) -> tuple[int, int]:
    """Return the shape of a weight's scales: [1, 1], [rows, 1] or [rows, groups]."""
    if group == TENSOR:
        return 1, 1
    return rows, max(1, -(-columns // group_width(group, columns)))


def spread_scales(scales: Tensor, columns: int, group: int) -> Tensor:
    """Return scales that broadcast over a weight of so many columns."""
    if scales.shape[1] <= 1 or group <= 0:
        return scales
    return scales.repeat_interleave(group, 1)[:, :columns]


def strides_of(scales: Tensor) -> tuple[int, int]:
    """Return the strides of scales by row and by group. 0 means that all share one scale."""
    rows, groups = scales.shape
    return (groups if rows > 1 else 0), (1 if groups > 1 else 0)


def as_native(tensor: Tensor) -> tuple[Tensor, bool]:
    """Return the tensor, contiguous, in float32 or bfloat16, and True if it is float32."""
    wide = tensor.dtype is not torch.bfloat16
    return (tensor.float() if wide else tensor).contiguous(), wide
