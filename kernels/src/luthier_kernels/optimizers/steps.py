"""Steps of AdamW, in place, with moments in 8 bits (blocks of 256) or float32.

A parameter and its gradient have any shape, in float32 or bfloat16. If `key` is None, a bfloat16 parameter is rounded
to the nearest; otherwise stochastically, so that steps smaller than its resolution are not lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier_kernels.dispatch import run_first
from luthier_kernels.gpu import count_programs, jit, runs_triton, tl
from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.optimizers.arithmetic import (
    BLOCK,
    Rates,
    decode_moments,
    encode_moments,
    round_values,
    rounded_at_random,
    update_values,
)

GRAIN = 256  # fewest blocks for which a thread is worth its start
NATIVE = (torch.float32, torch.bfloat16)
Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def step_eight_bits(p: Tensor, g: Tensor, codes: Pair, scales: Pair, rates: Rates, key: int | None = None) -> None:
    """Take a step with 8-bit moments: `codes` int8 and uint8 like `p`, `scales` float32 [ceil(n / 256)] each."""
    _check(p, g)
    run_first(
        "step_adamw_8bit",
        ("triton", runs_triton(p, g), lambda: _eight_triton(p, g, codes, scales, rates, key)),
        ("native", _is_native(p, g), lambda: _native("step_eight", p, g, (codes, scales), rates, key)),
        ("torch", True, lambda: reference_eight(p, g, codes, scales, rates, key)),
    )


@torch.no_grad()
def step_floats(p: Tensor, g: Tensor, moments: Pair, rates: Rates, key: int | None = None) -> None:
    """Take a step with float32 moments of the parameter's shape."""
    _check(p, g)
    run_first(
        "step_adamw",
        ("triton", runs_triton(p, g), lambda: _float_triton(p, g, moments, rates, key)),
        ("native", _is_native(p, g), lambda: _native("step_float", p, g, (moments,), rates, key)),
        ("torch", True, lambda: reference_floats(p, g, moments, rates, key)),
    )


def reference_eight(p: Tensor, g: Tensor, codes: Pair, scales: Pair, rates: Rates, key: int | None) -> None:
    """Take the same step in plain torch, which every implementation must match."""
    m, v = decode_moments(codes, scales)
    moved, m, v = update_values(_wide(p), _wide(g), m, v, rates)
    for buffer, made in zip((*codes, *scales), (t for pair in encode_moments(m, v) for t in pair), strict=True):
        buffer.copy_(made)
    p.copy_(round_values(moved, p.dtype, key).view_as(p))


def reference_floats(p: Tensor, g: Tensor, moments: Pair, rates: Rates, key: int | None) -> None:
    """Take the same step in plain torch, in float64 for a float64 parameter."""
    first, second = (moment.view(-1) for moment in moments)
    moved, *made = update_values(_wide(p), _wide(g), first, second, rates)
    for buffer, moment in zip(moments, made, strict=True):
        buffer.view(-1).copy_(moment)
    p.copy_(round_values(moved, p.dtype, key).view_as(p))


def _native(name: str, p: Tensor, g: Tensor, moments: tuple[Pair, ...], rates: Rates, key: int | None) -> None:
    if len(moments) == 2:
        (mc, vc), (ms, vs) = moments
        state: tuple[Tensor, ...] = (mc, ms, vc, vs)
    else:
        state = moments[0]
    call, blocks = native_function("adamw", name), -(-p.numel() // BLOCK)
    wides = p.dtype is torch.float32, g.dtype is torch.float32

    def step_part(start: int, end: int) -> None:
        ends = (start, end, p.numel(), BLOCK)
        call(p, wides[0], g, wides[1], *state, *ends, *map(float, rates), key is not None, key or 0)

    run_parts(blocks, GRAIN, step_part)


@jit
def eight_kernel(
    p: Any, g: Any, mc: Any, ms: Any, vc: Any, vs: Any, total: Any, beta1: Any, beta2: Any, eps: Any, decay: Any,
    size: Any, root: Any, key: Any, at_random: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes one block."""
    b = tl.program_id(0)
    place = b.to(tl.int64) * block + tl.arange(0, block)
    inside = place < total
    a = tl.load(mc + place, mask=inside, other=0).to(tl.float32) / 127.0
    c = tl.load(vc + place, mask=inside, other=0).to(tl.float32) / 255.0
    c2 = c * c
    m = tl.where(a < 0, -(a * a * a * a), a * a * a * a) * tl.load(ms + b)
    v = c2 * c2 * c2 * c2 * tl.load(vs + b)
    grad = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    m = beta1 * m + (1.0 - beta1) * grad
    v = beta2 * v + (1.0 - beta2) * (grad * grad)
    value = tl.load(p + place, mask=inside, other=0.0).to(tl.float32)
    value = value * decay - size * (m / (tl.sqrt(v) / root + eps))
    if at_random:
        value = rounded_at_random(value, place, key)
    tl.store(p + place, value.to(p.dtype.element_ty), mask=inside)
    largest_m, largest_v = tl.max(tl.abs(m), 0), tl.max(v, 0)
    code = tl.sqrt(tl.sqrt(tl.abs(m) / tl.where(largest_m > 0, largest_m, 1.0))) * 127.0
    code = (code + 12582912.0) - 12582912.0
    tl.store(mc + place, tl.where(m < 0, -code, code).to(tl.int8), mask=inside)
    up = tl.ceil(tl.sqrt(tl.sqrt(tl.sqrt(v / tl.where(largest_v > 0, largest_v, 1.0)))) * 255.0)
    tl.store(vc + place, tl.minimum(up, 255.0).to(tl.int32).to(tl.uint8), mask=inside)
    tl.store(ms + b, largest_m)
    tl.store(vs + b, largest_v)


def _eight_triton(p: Tensor, g: Tensor, codes: Pair, scales: Pair, rates: Rates, key: int | None) -> None:
    (mc, vc), (ms, vs) = codes, scales
    grid = (count_programs(p.numel(), BLOCK),)
    given = (p, g, mc, ms, vc, vs, p.numel(), *rates, key or 0)
    eight_kernel[grid](*given, at_random=_at_random(p, key), block=BLOCK)


@jit
def float_kernel(
    p: Any, g: Any, m: Any, v: Any, total: Any, beta1: Any, beta2: Any, eps: Any, decay: Any, size: Any, root: Any,
    key: Any, at_random: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes `block` neighbours."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < total
    grad = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    first = beta1 * tl.load(m + place, mask=inside, other=0.0) + (1.0 - beta1) * grad
    second = beta2 * tl.load(v + place, mask=inside, other=0.0) + (1.0 - beta2) * (grad * grad)
    value = tl.load(p + place, mask=inside, other=0.0).to(tl.float32)
    value = value * decay - size * (first / (tl.sqrt(second) / root + eps))
    if at_random:
        value = rounded_at_random(value, place, key)
    tl.store(p + place, value.to(p.dtype.element_ty), mask=inside)
    tl.store(m + place, first, mask=inside)
    tl.store(v + place, second, mask=inside)


def _float_triton(p: Tensor, g: Tensor, moments: Pair, rates: Rates, key: int | None) -> None:
    grid = (count_programs(p.numel(), 1024),)
    float_kernel[grid](p, g, *moments, p.numel(), *rates, key or 0, at_random=_at_random(p, key), block=1024)


def _at_random(p: Tensor, key: int | None) -> bool:
    return key is not None and p.dtype is torch.bfloat16


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor flat, in float32 or better."""
    return tensor.reshape(-1).to(torch.promote_types(tensor.dtype, torch.float32))


def _is_native(p: Tensor, g: Tensor) -> bool:
    real = not getattr(p, "has_no_data", False)  # a rehearsal has no memory to write to
    return real and p.device.type == "cpu" and p.dtype in NATIVE and g.dtype in NATIVE and has_native("adamw")


def _check(p: Tensor, g: Tensor) -> None:
    if not (p.is_contiguous() and g.is_contiguous() and p.shape == g.shape):
        raise ValueError(f"step: parameter {list(p.shape)} and gradient {list(g.shape)} must be alike and contiguous")
