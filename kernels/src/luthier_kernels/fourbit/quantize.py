"""4-bit quantization (NF4: arXiv 2305.14314; FP4) in the bytes and scales of bitsandbytes.

A weight [...] in float32, bfloat16 or float16 becomes packed codes [ceil(n / 2)] uint8 and one float32 scale for each
block of the flattened weight [ceil(n / block)]. A code stands for the value nearest to w / absmax of its block. The
even element of a pair is in the high four bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_kernels.dispatch import run_first
from luthier_kernels.fourbit.codebooks import check_format, code_order, decision_points
from luthier_kernels.gpu import count_programs, jit, runs_triton, tl
from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.registration import register_operation

SMALLEST = 1e-38
CHUNK = 1 << 16  # elements at a time in plain torch: stays in a processor's cache


def quantize_fourbit(weight: Tensor, kind: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return the packed codes [ceil(n / 2)] uint8 and the scales [ceil(n / block_size)] float32 of a weight.

    `kind` is `nf4` or `fp4`. A block of zeros has the scale 0. The caller must refuse NaN and infinity.
    """
    check_format(kind, block_size)
    return OPERATION(weight.detach(), kind, block_size)


def reference_quantize(weight: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Compute the same in plain torch, in float64 for float64 weights, otherwise in float32."""
    flat = weight.reshape(-1).to(torch.promote_types(weight.dtype, torch.float32))
    whole = flat.numel() // block_size * block_size
    blocks, rest = flat[:whole].view(-1, block_size), flat[whole:]
    scales = blocks.abs().amax(1) if whole else flat.new_zeros(0)
    scaled = (blocks * (1.0 / scales.clamp(min=SMALLEST))[:, None]).clamp(-1, 1).view(-1)
    if rest.numel():  # bitsandbytes divides the last, shorter block, and keeps its scale above zero
        last = rest.abs().max().clamp(min=SMALLEST)
        scales = torch.cat([scales, last[None]])
        scaled = torch.cat([scaled, (rest / last).clamp(-1, 1)])
    scaled = F.pad(scaled, (0, scaled.numel() % 2))
    places = torch.bucketize(scaled, decision_points(kind, flat.device).to(scaled.dtype), out_int32=True)
    codes = code_order(kind, flat.device)[places]
    return codes[::2] << 4 | codes[1::2], scales


def _quantize_torch(weight: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    size = max(CHUNK, block_size) if weight.device.type == "cpu" else max(weight.numel(), 1)
    parts = [reference_quantize(part, kind, block_size) for part in weight.reshape(-1).split(size)]
    packed, scales = zip(*parts, strict=True)
    return torch.cat(packed), torch.cat(scales)


def _quantize_native(weight: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    wide = weight.dtype is not torch.bfloat16
    flat = (weight.float() if wide else weight).reshape(-1).contiguous()
    packed, scales = _results(flat, block_size)
    points = decision_points(kind, flat.device)
    order = None if kind == "nf4" else code_order(kind, flat.device)  # NF4's codes ascend
    call = native_function("fourbit", "quantize_blocks")

    def quantize_part(start: int, end: int) -> None:
        call(flat, wide, start, end, flat.numel(), block_size, points, order, scales, packed)

    run_parts(scales.numel(), CHUNK // block_size, quantize_part)
    return packed, scales


@jit
def quantize_kernel(
    weight: Any, points: Any, order: Any, packed: Any, scales: Any, total: Any, block: tl.constexpr, rows: tl.constexpr
) -> None:
    """Each program computes `rows` blocks."""
    first = tl.program_id(0).to(tl.int64) * rows
    half: tl.constexpr = block // 2
    row = first + tl.arange(0, rows)[:, None]
    pair = row * half + tl.arange(0, half)[None, :]
    even = tl.load(weight + 2 * pair, mask=2 * pair < total, other=0.0).to(tl.float32)
    odd = tl.load(weight + 2 * pair + 1, mask=2 * pair + 1 < total, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
    divisor = tl.maximum(largest, 1e-38)
    whole = (first + tl.arange(0, rows) + 1) * block <= total
    factor = tl.div_rn(1.0, divisor)[:, None]
    even = tl.where(whole[:, None], even * factor, tl.div_rn(even, divisor[:, None] + tl.zeros_like(even)))
    odd = tl.where(whole[:, None], odd * factor, tl.div_rn(odd, divisor[:, None] + tl.zeros_like(odd)))
    high = tl.zeros_like(even).to(tl.int32)
    low = tl.zeros_like(odd).to(tl.int32)
    for place in tl.static_range(15):
        point = tl.load(points + place)
        high += (even > point).to(tl.int32)
        low += (odd > point).to(tl.int32)
    codes = tl.load(order + high).to(tl.int32) * 16 + tl.load(order + low).to(tl.int32)
    tl.store(packed + pair, codes.to(tl.uint8), mask=2 * pair < total)
    places = first + tl.arange(0, rows)
    tl.store(scales + places, tl.where(whole, largest, divisor), mask=places * block < total)


def _quantize_triton(weight: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    flat = weight.reshape(-1).contiguous()
    packed, scales = _results(flat, block_size)
    points, order = (table(kind, flat.device) for table in (decision_points, code_order))
    rows = max(1, 4096 // block_size)
    grid = (count_programs(scales.numel(), rows),)
    quantize_kernel[grid](flat, points, order, packed, scales, flat.numel(), block=block_size, rows=rows)
    return packed, scales


def _quantize(weight: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    single = weight.dtype is not torch.float64 and weight.numel() > 0
    native = single and weight.device.type == "cpu" and has_native("fourbit")
    return run_first(
        "quantize_fourbit",
        ("triton", single and runs_triton(weight), lambda: _quantize_triton(weight, kind, block_size)),
        ("native", native, lambda: _quantize_native(weight, kind, block_size)),
        ("torch", True, lambda: _quantize_torch(weight, kind, block_size)),
    )


def _results(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return uninitialised codes and scales for the elements of `flat`."""
    packed = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=flat.device)
    return packed, torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=flat.device)


OPERATION = register_operation(
    "quantize_fourbit(Tensor weight, str kind, int block_size) -> (Tensor, Tensor)",
    _quantize,
    lambda weight, kind, block_size: _results(weight, block_size),
)
