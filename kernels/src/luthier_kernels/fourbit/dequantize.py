"""4-bit dequantization: weight = value * scale, computed in float32 and rounded once.

Packed codes are [ceil(n / 2)] uint8, their scales float32, or nested (see nesting.py). The weight has any shape, in
float32, bfloat16, float16 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier_kernels.dispatch import run_first
from luthier_kernels.fourbit.codebooks import check_format, code_values, dynamic_map
from luthier_kernels.fourbit.nesting import NESTED_BLOCK, unnest_scales
from luthier_kernels.gpu import count_programs, jit, runs_triton, tl
from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.registration import register_operation

CHUNK = 1 << 16
NATIVE = (torch.float32, torch.bfloat16)
PAIRS = 1024  # bytes of one Triton program


class FourBitParts(NamedTuple):
    """A packed weight: its codes, its scales, what nested scales need (None for plain ones), and its format."""

    packed: Tensor
    scales: Tensor
    nested: Tensor | None
    offset: Tensor | None
    kind: str
    block_size: int


def dequantize_fourbit(
    packed: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    kind: str = "nf4",
    block_size: int = 64,
    nesting: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the weight of this shape. `nesting` is (scales of the scales, offset) where `scales` are uint8 codes."""
    check_format(kind, block_size)
    nested, offset = nesting or (None, None)
    return OPERATION(packed, scales, nested, offset, list(shape), kind, block_size, dtype)


def reference_dequantize(packed: Tensor, scales: Tensor, kind: str, block_size: int, total: int) -> Tensor:
    """Return `total` elements, flat, in the dtype of the scales (float32 or float64), by plain torch."""
    bytes_ = packed.view(-1).int()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).view(-1)[:total]
    factors = scales.repeat_interleave(block_size)[:total]
    return code_values(kind, packed.device).to(scales.dtype)[codes] * factors


def _dequantize_torch(parts: FourBitParts, out: Tensor) -> None:
    packed, scales, nested, offset, kind, block_size = parts
    if nested is not None and offset is not None:
        scales = unnest_scales(scales, nested, offset)
    flat, size = out.view(-1), max(CHUNK, block_size)
    for start in range(0, flat.numel(), size):
        part = flat[start : start + size]
        chosen = scales[start // block_size : -(-(start + size) // block_size)]
        values = reference_dequantize(packed[start // 2 : -(-(start + size) // 2)], chosen, kind, block_size, len(part))
        part.copy_(values)


def _dequantize_native(parts: FourBitParts, out: Tensor) -> None:
    packed, scales, nested, offset, kind, block_size = parts
    plain, codes = (scales, None) if nested is None else (None, scales)
    table, values = dynamic_map(packed.device), code_values(kind, packed.device)
    given = (packed, plain, codes, nested, table, offset, NESTED_BLOCK, values)
    call, wide = native_function("fourbit", "dequantize_blocks"), out.dtype is torch.float32

    def dequantize_part(start: int, end: int) -> None:
        call(*given, start, end, out.numel(), block_size, wide, out)

    run_parts(scales.numel(), CHUNK // block_size, dequantize_part)


@jit
def dequantize_kernel(
    packed: Any, scales: Any, nested: Any, table: Any, offset: Any, values: Any, out: Any, total: Any,
    block: tl.constexpr, nested_block: tl.constexpr, is_nested: tl.constexpr, pairs: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes `pairs` bytes, two elements each."""
    pair = tl.program_id(0).to(tl.int64) * pairs + tl.arange(0, pairs)
    codes = tl.load(packed + pair, mask=2 * pair < total, other=0).to(tl.int32)
    place = 2 * pair // block
    inside = 2 * pair < total
    if is_nested:
        code = tl.load(scales + place, mask=inside, other=0).to(tl.int32)
        factor = tl.load(nested + place // nested_block, mask=inside, other=0.0)
        scale = tl.load(table + code) * factor + tl.load(offset)
    else:
        scale = tl.load(scales + place, mask=inside, other=0.0)
    high = tl.load(values + (codes >> 4)) * scale
    low = tl.load(values + (codes & 15)) * scale
    both = tl.interleave(high, low)
    element = 2 * tl.program_id(0).to(tl.int64) * pairs + tl.arange(0, 2 * pairs)
    tl.store(out + element, both.to(out.dtype.element_ty), mask=element < total)


def _dequantize_triton(parts: FourBitParts, out: Tensor) -> None:
    packed, scales, nested, offset, kind, block_size = parts
    device, total = packed.device, out.numel()
    table, values = dynamic_map(device), code_values(kind, device)
    given = (packed, scales, values if nested is None else nested, table, values if offset is None else offset, values)
    grid = (count_programs(total, 2 * PAIRS),)
    dequantize_kernel[grid](
        *given, out, total, block=block_size, nested_block=NESTED_BLOCK, is_nested=nested is not None, pairs=PAIRS,
        enable_fp_fusion=False,  # a fused multiply-add would round otherwise than the other implementations
    )  # fmt: skip


def fill_dequantized(parts: FourBitParts, out: Tensor) -> Tensor:
    """Write the weight into `out` and return it. `out` is contiguous and has as many elements as the weight."""
    if not out.is_contiguous():
        raise ValueError("dequantize_fourbit: `out` must be contiguous")
    parts = parts._replace(packed=parts.packed.reshape(-1).view(torch.uint8))
    triton = out.numel() > 0 and out.dtype is not torch.float64 and runs_triton(parts.packed, out)
    native = out.dtype in NATIVE and out.device.type == "cpu" and has_native("fourbit")
    run_first(
        "dequantize_fourbit",
        ("triton", triton, lambda: _dequantize_triton(parts, out)),
        ("native", native, lambda: _dequantize_native(parts, out)),
        ("torch", True, lambda: _dequantize_torch(parts, out)),
    )
    return out


def _dequantize(
    packed: Tensor, scales: Tensor, nested: Tensor | None, offset: Tensor | None, shape: list[int], kind: str,
    block_size: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    return fill_dequantized(FourBitParts(packed, scales, nested, offset, kind, block_size), out)


OPERATION = register_operation(
    "dequantize_fourbit(Tensor packed, Tensor scales, Tensor? nested, Tensor? offset, SymInt[] shape, str kind, "
    "int block_size, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda packed, scales, nested, offset, shape, kind, block_size, dtype: packed.new_empty(shape, dtype=dtype),
)
