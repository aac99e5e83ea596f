"""Rotary position embedding (arXiv 2104.09864) of packed tokens.

Heads [T, heads, D] are float32, bfloat16, float16 or float64; tables of cosines and sines are [P, D], positions [T].
The halves (a, b) of a head become (a cos - b sin, b cos + a sin), as in transformers, computed in float32 (float64 for
float64) and rounded once. The gradient is the rotation back, by the sines of the other half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier_kernels.dispatch import run_first
from luthier_kernels.gpu import jit, runs_triton, tl, triton
from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.registration import register_operation

NATIVE = (torch.float32, torch.bfloat16)
LARGEST = 2048


def rotate_heads(heads: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor) -> Tensor:
    """Return the rotated heads [T, heads, D]; for queries or for keys. The tables get no gradient."""
    if heads.shape[-1] % 2 or heads.dim() != 3:
        raise ValueError(f"rotate_heads: expected [tokens, heads, an even number], got {list(heads.shape)}")
    return OPERATION(heads, cosines, sines, positions, 1.0)


def reference_rotate(heads: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor, sign: float) -> Tensor:
    """Compute the same in plain torch, which every implementation must match; float64 stays float64."""
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    c, s = (table[positions].to(wide.dtype)[:, None] for table in (cosines, sines))
    a, b = wide.chunk(2, -1)
    return (wide * c + sign * (torch.cat([-b, a], -1) * s)).to(heads.dtype)


def _rotate(heads: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor, sign: float) -> Tensor:
    known = heads.numel() > 0 and heads.dtype is not torch.float64 and heads.shape[-1] <= LARGEST
    native = known and heads.dtype in NATIVE and heads.device.type == "cpu" and has_native("elementwise")
    given = (heads, cosines, sines, positions, sign)
    return run_first(
        "rotate_heads",
        ("triton", known and runs_triton(heads), lambda: _rotate_triton(*given)),
        ("native", native, lambda: _rotate_native(*given)),
        ("torch", True, lambda: reference_rotate(*given)),
    )


def _rotate_native(heads: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor, sign: float) -> Tensor:
    heads, out = heads.contiguous(), torch.empty(heads.shape, dtype=heads.dtype)
    tokens, count, size = heads.shape
    tables = [table.float().contiguous() for table in (cosines, sines)]
    places = positions.long().contiguous()
    call, wide = native_function("elementwise", "rotate_heads"), heads.dtype is torch.float32

    def rotate_part(start: int, end: int) -> None:
        call(heads, wide, *tables, places, float(sign), start, end, count, size, out)

    run_parts(tokens, 16, rotate_part)
    return out


@jit
def rotate_kernel(
    heads: Any, cosines: Any, sines: Any, positions: Any, out: Any, count: Any, sign: Any, half: Any, size: tl.constexpr
) -> None:
    """Each program computes one head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, size)
    inside = place < half
    table = tl.load(positions + token) * 2 * half + place
    first = (token * count + head) * 2 * half + place
    a = tl.load(heads + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(heads + first + half, mask=inside, other=0.0).to(tl.float32)
    left = a * tl.load(cosines + table, mask=inside, other=0.0).to(tl.float32)
    left -= sign * (b * tl.load(sines + table, mask=inside, other=0.0).to(tl.float32))
    right = b * tl.load(cosines + table + half, mask=inside, other=0.0).to(tl.float32)
    right += sign * (a * tl.load(sines + table + half, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + first, left.to(out.dtype.element_ty), mask=inside)
    tl.store(out + first + half, right.to(out.dtype.element_ty), mask=inside)


def _rotate_triton(heads: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor, sign: float) -> Tensor:
    heads, out = heads.contiguous(), torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    tokens, count, size = heads.shape
    given = (
        heads,
        cosines.contiguous(),
        sines.contiguous(),
        positions.long().contiguous(),
        out,
        count,
        sign,
        size // 2,
    )
    rotate_kernel[(tokens, count)](*given, size=triton.next_power_of_2(size // 2))
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cosines, sines, positions, ctx.sign = inputs
    ctx.save_for_backward(cosines, sines, positions)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    cosines, sines, positions = ctx.saved_tensors
    other = sines.roll(sines.shape[-1] // 2, -1)
    return OPERATION(gradient, cosines, other, positions, -ctx.sign), None, None, None, None


OPERATION = register_operation(
    "rotate_heads(Tensor heads, Tensor cosines, Tensor sines, Tensor positions, float sign) -> Tensor",
    _rotate,
    lambda heads, cosines, sines, positions, sign: torch.empty_like(heads, memory_format=torch.contiguous_format),
    _save,
    _backward,
)
