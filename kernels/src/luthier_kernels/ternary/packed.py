"""The ternary linear layer for inference: states [..., in] times packed codes give [..., out] in the states' dtype.

Codes are [out, 64 ceil(in / 256)] uint8 in the layout of `pack_columns`; scales are [1, 1] or [out, 1]. Activations are
quantized to int8 token by token, and the result equals `multiply_ternary`'s bit for bit. For few rows the packed bytes
are multiplied directly; for many they are unpacked first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from luthier_kernels.dispatch import run_first
from luthier_kernels.gpu import jit, runs_triton, tl, triton
from luthier_kernels.native import has_native
from luthier_kernels.registration import register_operation
from luthier_kernels.ternary.activations import quantize_rows
from luthier_kernels.ternary.integers import FEW, multiply_few, multiply_integers
from luthier_kernels.ternary.packing import BLOCK, unpack_columns


def multiply_packed(states: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Return states @ (codes * scales).T, without a gradient."""
    return OPERATION(states.detach(), packed, scales)


def _multiply(states: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    columns = states.shape[-1]
    codes, steps = quantize_rows(states.reshape(-1, columns))
    few = 0 < codes.shape[0] <= FEW
    out = run_first(
        "multiply_packed",
        (
            "triton",
            few and runs_triton(codes, packed),
            lambda: _multiply_triton(codes, packed, steps, scales, states.dtype),
        ),
        (
            "native",
            few and packed.device.type == "cpu" and has_native("decode"),
            lambda: multiply_few("multiply_packed", _fill_blocks(codes), packed, steps, scales, states.dtype),
        ),
        ("torch", True, lambda: multiply_integers(codes, unpack_columns(packed, columns), steps, scales, states.dtype)),
    )
    return out.view(*states.shape[:-1], packed.shape[0])


def _fill_blocks(codes: Tensor) -> Tensor:
    """Return the codes with zeros up to whole blocks of columns."""
    missing = -codes.shape[1] % BLOCK
    return F.pad(codes, (0, missing)) if missing else codes


@jit
def packed_kernel(
    states: Any, packed: Any, steps: Any, scales: Any, out: Any, outputs: Any, columns: Any, width: Any,
    scale_stride: Any, tile_n: tl.constexpr, quarter: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes `tile_n` outputs of one row of states."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * tile_n + tl.arange(0, tile_n)
    place = tl.arange(0, quarter)
    sums = tl.zeros((tile_n,), dtype=tl.int32)
    for block in range(0, width // quarter):
        address = packed + n.to(tl.int64)[:, None] * width + block * quarter + place[None, :]
        bytes_ = tl.load(address, mask=(n < outputs)[:, None], other=0).to(tl.int32)
        for part in tl.static_range(4):
            k = block * 4 * quarter + part * quarter + place
            x = tl.load(states + row * columns + k, mask=k < columns, other=0).to(tl.int32)
            sums += tl.sum(((bytes_ >> (2 * part) & 3) - 1) * x[None, :], 1)
    scale = tl.load(scales + n * scale_stride, mask=n < outputs, other=0.0)
    value = sums.to(tl.float32) * tl.load(steps + row) * scale
    tl.store(out + row * outputs + n, value.to(out.dtype.element_ty), mask=n < outputs)


def _multiply_triton(codes: Tensor, packed: Tensor, steps: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    rows, (outputs, width) = codes.shape[0], packed.shape
    out = torch.empty(rows, outputs, dtype=dtype, device=codes.device)
    grid = (rows, triton.cdiv(outputs, 16))
    given = (codes.contiguous(), packed, steps, scales, out, outputs, codes.shape[1], width, int(scales.numel() > 1))
    packed_kernel[grid](*given, tile_n=16, quarter=BLOCK // 4)
    return out


OPERATION = register_operation(
    "multiply_packed(Tensor states, Tensor packed, Tensor scales) -> Tensor",
    _multiply,
    lambda states, packed, scales: states.new_empty((*states.shape[:-1], packed.shape[0])),
)
