"""The exact product of int8 matrices: states [M, K] @ codes [N, K].T gives int32 [M, N].

Scaled by steps [M, 1] and scales [1, 1] or [N, 1] it is (sum * step) * scale, computed in float32, in float32 or
bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_kernels.dispatch import run_first
from luthier_kernels.gpu import jit, runs_triton, tl, triton
from luthier_kernels.native import has_native, native_function, run_parts

NATIVE = (torch.float32, torch.bfloat16)
EXACT = 2**24 // 127  # columns of ternary codes whose sums float32 holds exactly
FEW = 8  # rows of states up to which the weight is read once, by our own loop
GRAIN = 1 << 18  # weights of a thread, at least
DEPTH, PANEL = 64, 32  # columns of the factors that the matrix unit takes at once, and of the product


def multiply_integers(states: Tensor, codes: Tensor, steps: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (states @ codes.T) * steps * scales [M, N] in `dtype`; codes are -1, 0 and 1."""
    if states.numel() == 0 or codes.numel() == 0:
        return torch.zeros(states.shape[0], codes.shape[0], dtype=dtype, device=states.device)

    def multiply_native() -> Tensor:
        if states.shape[0] <= FEW and has_native("decode"):
            return multiply_few("multiply_codes", states, codes, steps, scales, dtype)
        if states.shape[1] % DEPTH == 0 and has_unit():
            return _multiply_scaled(states, codes, steps, scales, dtype)
        return _scale_native(sum_products(states, codes), steps, scales, dtype)

    return run_first(
        "multiply_integers",
        ("triton", runs_triton(states, codes), lambda: _multiply_triton(states, codes, steps, scales, dtype)),
        ("native", dtype in NATIVE and states.device.type == "cpu" and has_native("ternary"),
         multiply_native),
        ("torch", True, lambda: scale_sums(sum_products(states, codes), steps, scales, dtype)),
    )  # fmt: skip


@functools.cache
def has_unit() -> bool:
    """Return True if this processor has a matrix unit (AMX) that the process may use."""
    if not has_native("matrix"):
        return False
    usable = torch.zeros(1, dtype=torch.int64)
    native_function("matrix", "describe_matrix")(usable)
    return bool(usable.item())


def _multiply_scaled(states: Tensor, codes: Tensor, steps: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    states, codes = states.contiguous(), codes.contiguous()
    (rows, depth), outputs = states.shape, codes.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype)
    call, stride, wide = native_function("matrix", "multiply_scaled"), int(scales.numel() > 1), dtype is torch.float32

    def multiply_part(start: int, end: int) -> None:
        call(states, rows, depth, codes, steps, scales, stride, start, end, outputs, wide, out)

    run_parts(outputs, -(-GRAIN // depth // PANEL) * PANEL, multiply_part)
    return out


def scale_sums(sums: Tensor, steps: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (sums * steps) * scales in plain torch."""
    return (sums.to(steps.dtype) * steps * scales.view(1, -1)).to(dtype)


def sum_products(states: Tensor, codes: Tensor) -> Tensor:
    """Return states @ codes.T as int32 [M, N], exact."""
    if states.device.type == "cpu" and _has_dots() and states.shape[1] > 1:  # torch 2.13 misreads one transposed column
        return torch._int_mm(states, codes.t())
    if states.is_cuda and states.shape[1] % 8 == 0 and codes.shape[0] % 8 == 0:
        rows = states.shape[0]
        return torch._int_mm(F.pad(states, (0, 0, 0, max(0, 17 - rows))), codes.t())[:rows]
    dtype = torch.float32 if states.shape[1] <= EXACT else torch.float64
    return (states.to(dtype) @ codes.to(dtype).t()).int()


def _has_dots() -> bool:
    """Return True if int8 products are faster than float32 here. Without AVX-512 torch computes them one by one."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def multiply_few(
    name: str, states: Tensor, weight: Tensor, steps: Tensor, scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the scaled product of at most `FEW` rows [M, K] by a weight [N, ...], computed by a C function."""
    (rows, columns), outputs = states.shape, weight.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype if dtype in NATIVE else torch.float32)
    call, stride, wide = native_function("decode", name), int(scales.numel() > 1), out.dtype is torch.float32
    states, weight = states.contiguous(), weight.contiguous()

    def multiply_part(start: int, end: int) -> None:
        call(weight, states, steps, scales, stride, rows, columns, start, end, outputs, wide, out)

    run_parts(outputs, -(-GRAIN // max(columns, 1)), multiply_part)
    return out.to(dtype)


def _scale_native(sums: Tensor, steps: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    rows, columns = sums.shape
    out = torch.empty(rows, columns, dtype=dtype)
    call, stride = native_function("ternary", "scale_sums"), int(scales.numel() > 1)

    def scale_part(start: int, end: int) -> None:
        call(sums, start, end, columns, steps, scales, stride, dtype is torch.float32, out)

    run_parts(rows, -(-(1 << 15) // columns), scale_part)
    return out


@jit
def multiply_kernel(
    states: Any, codes: Any, steps: Any, scales: Any, out: Any, rows: Any, outputs: Any, columns: Any,
    scale_stride: Any, tile_m: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes a tile of the output, [tile_m, tile_n]."""
    m = tl.program_id(0) * tile_m + tl.arange(0, tile_m)
    n = tl.program_id(1) * tile_n + tl.arange(0, tile_n)
    k = tl.arange(0, tile_k)
    sums = tl.zeros((tile_m, tile_n), dtype=tl.int32)
    for first in range(0, columns, tile_k):
        inside = first + k < columns
        left = states + m.to(tl.int64)[:, None] * columns + first + k[None, :]
        right = codes + n.to(tl.int64)[None, :] * columns + first + k[:, None]
        a = tl.load(left, mask=(m < rows)[:, None] & inside[None, :], other=0)
        b = tl.load(right, mask=(n < outputs)[None, :] & inside[:, None], other=0)
        sums += tl.dot(a, b, out_dtype=tl.int32)
    step = tl.load(steps + m, mask=m < rows, other=0.0)
    scale = tl.load(scales + n * scale_stride, mask=n < outputs, other=0.0)
    value = sums.to(tl.float32) * step[:, None] * scale[None, :]
    place = out + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


def _multiply_triton(states: Tensor, codes: Tensor, steps: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    states, codes = states.contiguous(), codes.contiguous()
    (rows, columns), outputs = states.shape, codes.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=states.device)
    tile_m = 128 if rows > 64 else 32
    grid = (triton.cdiv(rows, tile_m), triton.cdiv(outputs, 128))
    given = (states, codes, steps, scales, out, rows, outputs, columns, int(scales.numel() > 1))
    multiply_kernel[grid](*given, tile_m=tile_m, tile_n=128, tile_k=64)
    return out
