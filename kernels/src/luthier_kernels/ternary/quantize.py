"""Ternary quantization: a weight [out, in] becomes codes -1, 0, 1 [out, in] int8 and float32 scales.

The weight is float32, bfloat16, float16 or float64. Scales are [1, 1] (one for the weight), [out, 1] (one for each row)
or [out, ceil(in / group)]. Two methods choose them:

- `absmean` (BitNet b1.58, arXiv 2402.17764): the scale is the mean magnitude, at least 1e-5, and a code is round(w /
  scale), clipped to -1 and 1.
- `twn` (arXiv 1605.04711): a code is the sign of w if |w| > 0.75 mean |w|, else 0, and the scale is the mean magnitude
  of the weights that are not 0. For normally distributed weights this is close to the least squared error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_kernels.dispatch import run_first
from luthier_kernels.gpu import count_programs, jit, runs_triton, tl
from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.registration import register_operation
from luthier_kernels.ternary.groups import (
    TENSOR,
    as_native,
    check_granularity,
    group_width,
    scales_shape,
    spread_scales,
    strides_of,
)

METHODS = ("absmean", "twn")
SMALLEST, SHARE = 1e-5, 0.75
GRAIN = 1 << 16  # fewest elements for which a thread is worth its start


def quantize_ternary(
    weight: Tensor, granularity: str | int = "tensor", method: str = "absmean", factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return codes [out, in] int8 and scales float32 of a weight; `granularity` is tensor, row, or a group's size.

    The last group of a row may be shorter. `factor` multiplies the threshold, and with `absmean` the scale; with `twn`
    the scale stays the mean of the weights above it. They have no gradient: see `multiply_ternary`.
    """
    if method not in METHODS:
        raise ValueError(f"ternary method: expected one of {METHODS}, got {method!r}")
    return OPERATION(weight.detach(), check_granularity(granularity), method, factor)


def reference_quantize(weight: Tensor, group: int, method: str, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute the same in plain torch, with means in float64."""
    weight = weight if weight.dtype is torch.float64 else weight.float()
    sums, numbers = _sums_torch(weight, group, weight.new_full((1, 1), -1.0))
    means = (sums / numbers).to(weight.dtype)
    if method == "absmean":
        scales = (factor * means).clamp(min=SMALLEST)
        steps = weight * (1.0 / spread_scales(scales, weight.shape[1], group))
        return steps.round().clamp(-1, 1).to(torch.int8), scales
    thresholds = spread_scales(factor * SHARE * means, weight.shape[1], group)
    codes = (weight > thresholds).to(torch.int8) - (weight < -thresholds).to(torch.int8)
    sums, numbers = _sums_torch(weight, group, factor * SHARE * means)
    return codes, (sums / numbers.clamp(min=1)).clamp(min=SMALLEST).to(weight.dtype)


def _sums_torch(weight: Tensor, group: int, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums (float64) and counts (int64) of the magnitudes above the threshold, for each scale."""
    rows, columns = weight.shape
    width = group_width(group, columns)
    sizes = F.pad(weight.abs(), (0, -columns % width), value=-2.0).view(rows, -1, width)
    mask = sizes > thresholds[..., None]
    sums, numbers = (sizes * mask).sum(-1, dtype=torch.float64), mask.sum(-1)
    return (sums.sum()[None, None], numbers.sum()[None, None]) if group == TENSOR else (sums, numbers)


def _sums_native(weight: Tensor, wide: bool, group: int, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    width = group_width(group, columns)
    groups = -(-columns // width)
    sums = torch.empty(rows, groups, dtype=torch.float64)
    numbers = torch.empty(rows, groups, dtype=torch.int64)
    call, strides = native_function("ternary", "sum_above"), strides_of(thresholds)

    def sum_part(start: int, end: int) -> None:
        call(weight, wide, start, end, columns, width, thresholds, *strides, sums, numbers)

    run_parts(rows, -(-GRAIN // columns), sum_part)
    return (sums.sum()[None, None], numbers.sum()[None, None]) if group == TENSOR else (sums, numbers)


def _quantize_native(weight: Tensor, group: int, method: str, factor: float) -> tuple[Tensor, Tensor]:
    weight, wide = as_native(weight)
    rows, columns = weight.shape
    sums, numbers = _sums_native(weight, wide, group, torch.full((1, 1), -1.0))
    means = (sums / numbers).float()
    factors, thresholds, scales = _decide(means, method, factor)
    if method == "twn":
        sums, numbers = _sums_native(weight, wide, group, thresholds)
        scales = (sums / numbers.clamp(min=1)).clamp(min=SMALLEST).float()
    codes = torch.empty(rows, columns, dtype=torch.int8)
    call, strides, width = native_function("ternary", "encode_ternary"), strides_of(scales), group_width(group, columns)

    def encode_part(start: int, end: int) -> None:
        call(weight, wide, start, end, columns, width, factors, thresholds, *strides, codes)

    run_parts(rows, -(-GRAIN // columns), encode_part)
    return codes, scales


def _decide(means: Tensor, method: str, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors, thresholds and scales. The scales of `twn` are not final."""
    if method == "absmean":
        scales = (factor * means).clamp(min=SMALLEST)
        return 1.0 / scales, torch.full_like(scales, 0.5), scales  # 0.5 is rounded to even, which is 0
    return torch.ones_like(means), factor * SHARE * means, means


@jit
def encode_kernel(
    weight: Any, factors: Any, thresholds: Any, codes: Any, total: Any, columns: Any, width: Any, row_stride: Any,
    group_stride: Any, size: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes `size` neighbours of the flattened weight."""
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < total
    scale = place // columns * row_stride + place % columns // width * group_stride
    value = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(factors + scale, mask=inside, other=0.0)
    threshold = tl.load(thresholds + scale, mask=inside, other=1.0)
    code = (value > threshold).to(tl.int8) - (value < -threshold).to(tl.int8)
    tl.store(codes + place, code, mask=inside)


def _quantize_triton(weight: Tensor, group: int, method: str, factor: float) -> tuple[Tensor, Tensor]:
    """Return codes by the kernel, and scales by torch, in two deterministic passes without waiting for the device."""
    weight = weight.contiguous()
    rows, columns = weight.shape
    sums, numbers = _sums_torch(weight.float(), group, weight.new_full((1, 1), -1.0, dtype=torch.float32))
    factors, thresholds, scales = _decide((sums / numbers).float(), method, factor)
    if method == "twn":
        sums, numbers = _sums_torch(weight.float(), group, thresholds)
        scales = (sums / numbers.clamp(min=1)).clamp(min=SMALLEST).float()
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    grid = (count_programs(codes.numel(), 1024),)
    given = (weight, factors, thresholds, codes, codes.numel(), columns, group_width(group, columns))
    encode_kernel[grid](*given, *strides_of(scales), size=1024)
    return codes, scales


def _quantize(weight: Tensor, group: int, method: str, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    if weight.numel() == 0:
        scales = torch.full(scales_shape(weight.shape[0], weight.shape[1], group), SMALLEST, device=weight.device)
        return torch.empty(weight.shape, dtype=torch.int8, device=weight.device), scales
    single = weight.dtype is not torch.float64
    native = single and weight.device.type == "cpu" and has_native("ternary")
    codes, scales = run_first(
        "quantize_ternary",
        ("triton", single and runs_triton(weight), lambda: _quantize_triton(weight, group, method, factor)),
        ("native", native, lambda: _quantize_native(weight, group, method, factor)),
        ("torch", True, lambda: reference_quantize(weight, group, method, factor)),
    )
    return codes, scales.float()


def _fake(weight: Tensor, group: int, method: str, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    scales = weight.new_empty(scales_shape(weight.shape[0], weight.shape[1], group), dtype=torch.float32)
    return torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format), scales


OPERATION = register_operation(
    "quantize_ternary(Tensor weight, int group, str method, float factor=1.0) -> (Tensor, Tensor)", _quantize, _fake
)
