"""Codes [rows, columns] int8 times float32 scales [1, 1], [rows, 1] or [rows, groups].

The matrix is float32, bfloat16, float16 or float64, computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier_kernels.dispatch import run_first
from luthier_kernels.gpu import count_programs, jit, runs_triton, tl
from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.ternary.groups import check_granularity, group_width, spread_scales, strides_of

NATIVE = (torch.float32, torch.bfloat16)
GRAIN = 1 << 16


def expand_codes(
    codes: Tensor, scales: Tensor, granularity: str | int = "tensor", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return codes * scales. `granularity` is needed for groups only: it is their size."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return fill_expanded(codes, scales, check_granularity(granularity), out)


def reference_expand(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Compute the same in plain torch, in the dtype of the scales."""
    return codes.to(scales.dtype) * spread_scales(scales, codes.shape[1], group)


def fill_expanded(codes: Tensor, scales: Tensor, group: int, out: Tensor) -> Tensor:
    """Write codes * scales into `out`, which is contiguous and has the shape of the codes, and return it."""
    if out.numel() == 0:
        return out
    codes = codes.contiguous()
    has_memory = type(codes) is type(scales) is type(out) is Tensor  # not so the tensors of a rehearsal
    native = has_memory and out.dtype in NATIVE and out.device.type == "cpu" and has_native("ternary")
    triton = has_memory and out.dtype is not torch.float64 and runs_triton(codes, out)
    run_first(
        "expand_codes",
        ("triton", triton, lambda: _expand_triton(codes, scales, group, out)),
        ("native", native, lambda: _expand_native(codes, scales, group, out)),
        ("torch", True, lambda: out.copy_(reference_expand(codes, scales, group))),
    )
    return out


def _expand_native(codes: Tensor, scales: Tensor, group: int, out: Tensor) -> None:
    rows, columns = codes.shape
    call, strides, width = native_function("ternary", "expand_codes"), strides_of(scales), group_width(group, columns)

    def expand_part(start: int, end: int) -> None:
        call(codes, start, end, columns, width, scales, *strides, out.dtype is torch.float32, out)

    run_parts(rows, -(-GRAIN // columns), expand_part)


@jit
def expand_kernel(
    codes: Any, scales: Any, out: Any, total: Any, columns: Any, width: Any, row_stride: Any, group_stride: Any,
    size: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes `size` neighbours of the flattened codes."""
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < total
    scale = tl.load(
        scales + place // columns * row_stride + place % columns // width * group_stride, mask=inside, other=0.0
    )
    code = tl.load(codes + place, mask=inside, other=0).to(tl.float32)
    tl.store(out + place, (code * scale).to(out.dtype.element_ty), mask=inside)


def _expand_triton(codes: Tensor, scales: Tensor, group: int, out: Tensor) -> None:
    columns = codes.shape[1]
    grid = (count_programs(codes.numel(), 1024),)
    given = (codes, scales, out, codes.numel(), columns, group_width(group, columns))
    expand_kernel[grid](*given, *strides_of(scales), size=1024)
