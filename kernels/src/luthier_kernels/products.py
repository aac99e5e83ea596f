"""The product that the gradient of a weight is: left [rows, n], turned, times right [rows, k] gives [n, k]."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.scratch import borrow_scratch

SQUARE = 32  # columns that the C function turns at once
GRAIN = 1 << 18  # numbers that are worth a thread


def multiply_turned(left: Tensor, right: Tensor) -> Tensor:
    """Return left.t() @ right in their dtype.

    A processor with a matrix unit multiplies a turned left factor at half its speed, so there it is turned first.
    """
    halves = left.dtype is torch.bfloat16 and left.device.type == "cpu" and left.numel() > 0
    if not (halves and type(left) is Tensor and wants_turned()):  # the tensors of a rehearsal have no memory
        return left.t() @ right
    return turn_halves(left) @ right


def turn_halves(matrix: Tensor) -> Tensor:
    """Return matrix.t() of a bfloat16 matrix, contiguous, in borrowed memory."""
    matrix = matrix.contiguous()
    rows, columns = matrix.shape
    out = borrow_scratch((columns, rows), matrix.dtype, matrix.device, "turned")
    call = native_function("transpose", "transpose_halves")

    def turn_part(start: int, end: int) -> None:
        call(matrix, rows, columns, start, end, out)

    run_parts(columns, -(-GRAIN // rows // SQUARE) * SQUARE, turn_part)
    return out


@functools.cache
def wants_turned() -> bool:
    """Return True if this processor has a matrix unit, and the C function is compiled."""
    if not has_native("transpose"):
        return False
    wants = torch.zeros(1, dtype=torch.int64)
    native_function("transpose", "describe_products")(wants)
    return bool(wants.item())
