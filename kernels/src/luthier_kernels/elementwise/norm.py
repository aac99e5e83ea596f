"""RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * (offset + weight).

The states x [..., H] are float32, bfloat16, float16 or float64, and the weight is [H]. y has the dtype of x; it is
computed in float32 (float64 for float64) and rounded once. With a residual [..., H], the rounded sum of residual and
states is normalized, and returned too. For backward the states and one factor a row are kept. Gradients of the weight
are added up 64 rows at a time, so that they do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier_kernels.dispatch import run_first
from luthier_kernels.gpu import jit, runs_triton, tl, triton
from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.registration import register_operation
from luthier_kernels.ternary.activations import reference_quantize

WIDEST, CHUNK_ROWS = 65536, 64
NATIVE = (torch.float32, torch.bfloat16)


def normalize_rms(x: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    """Return the normalized states [..., H]. `offset` is 1 for Gemma's weights."""
    return FORWARD(x, None, weight, eps, offset)[0]


def add_and_normalize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the normalized sum of states and residual, and the sum, [..., H] each."""
    y, total, _ = FORWARD(x, residual, weight, eps, offset)
    return y, total


def normalize_quantized(x: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return int8 codes [..., H] and float32 steps [..., 1] of the normalized states, without gradient.

    They are those of `quantize_activations` on states that are not rounded in between.
    """
    x, scale = x.detach(), (weight.detach().float() + offset).contiguous()
    native = _is_native(x) and has_native("elementwise")
    return run_first(
        "normalize_quantized",
        ("native", native, lambda: _quantized_native(x, scale, eps)),
        ("torch", True, lambda: _quantized_torch(x, scale, eps)),
    )


def reference_normalize(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Compute the same in plain torch, which every implementation must match; float64 stays float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factors = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * factors * (weight.to(wide.dtype) + offset)).to(x.dtype)


def _quantized_torch(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    codes, steps = reference_quantize(reference_normalize(x.float(), scale, eps, 0.0))
    return codes, steps


def _quantized_native(x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, columns = x.contiguous(), x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8)
    steps = torch.empty(*x.shape[:-1], 1)
    call = native_function("elementwise", "normalize_quantized")
    wide = x.dtype is torch.float32
    run_parts(steps.numel(), 32, lambda start, end: call(x, wide, scale, float(eps), start, end, columns, codes, steps))
    return codes, steps


def _normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalized states, their sum with the residual (empty without one), and the factor of each row."""
    scale = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    native = _is_native(x) and has_native("elementwise")
    triton = x.numel() > 0 and x.dtype is not torch.float64 and x.shape[-1] <= WIDEST and runs_triton(x)
    return run_first(
        "normalize_rms",
        ("triton", triton, lambda: _normalize_triton(x, residual, scale, eps)),
        ("native", native, lambda: _normalize_native(x, residual, scale, eps)),
        ("torch", True, lambda: _normalize_torch(x, residual, scale, eps)),
    )


def _normalize_torch(x: Tensor, residual: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    factors = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * factors * scale).to(x.dtype), x.new_empty(0) if residual is None else total, factors


def _normalize_native(x: Tensor, residual: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    factors = torch.empty(*x.shape[:-1], 1)
    call, columns, wide = native_function("elementwise", "normalize_rows"), x.shape[-1], x.dtype is torch.float32
    sum_buffer = None if residual is None else total

    def normalize_part(start: int, end: int) -> None:
        call(x, residual, wide, scale, float(eps), start, end, columns, out, sum_buffer, factors)

    run_parts(factors.numel(), 32, normalize_part)
    return out, total, factors


@jit
def normalize_kernel(
    x: Any, residual: Any, scale: Any, out: Any, total: Any, factors: Any, columns: Any, eps: Any,
    has_residual: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes one row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, size)
    inside = place < columns
    value = tl.load(x + row * columns + place, mask=inside, other=0.0).to(tl.float32)
    if has_residual:
        value += tl.load(residual + row * columns + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * columns + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 0) / columns + eps)
    made = value * factor * tl.load(scale + place, mask=inside, other=0.0)
    tl.store(out + row * columns + place, made.to(out.dtype.element_ty), mask=inside)
    tl.store(factors + row, factor)


def _normalize_triton(x: Tensor, residual: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    factors = torch.empty(*x.shape[:-1], 1, device=x.device)
    columns = x.shape[-1]
    given = (x, x if residual is None else residual, scale, out, out if residual is None else total, factors)
    size = triton.next_power_of_2(columns)
    normalize_kernel[(factors.numel(),)](*given, columns, eps, has_residual=residual is not None, size=size)
    return out, total, factors


def _normalize_back(
    gradient: Tensor, to_total: Tensor | None, x: Tensor, weight: Tensor, factors: Tensor, offset: float, trains: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the (summed) states and of the weight (empty unless it `trains`)."""
    scale = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
    gradient, to_total = gradient.contiguous(), None if to_total is None else to_total.contiguous()
    given = (gradient, to_total, x, scale, factors, trains)
    native = _is_native(x) and gradient.dtype is x.dtype and has_native("elementwise")
    triton = x.numel() > 0 and x.dtype is not torch.float64 and x.shape[-1] <= WIDEST and runs_triton(x)
    to_x, to_scale = run_first(
        "normalize_rms_back",
        ("triton", triton, lambda: _back_triton(*given)),
        ("native", native, lambda: _back_native(*given)),
        ("torch", True, lambda: _back_torch(*given)),
    )
    return to_x, to_scale.to(weight.dtype)


def _back_torch(
    gradient: Tensor, to_total: Tensor | None, x: Tensor, scale: Tensor, factors: Tensor, trains: bool
) -> tuple[Tensor, Tensor]:
    wide, g = x.to(factors.dtype), gradient.to(factors.dtype)
    m = g * scale
    to_x = factors * (m - wide * factors.square() * (m * wide).mean(-1, keepdim=True))
    to_x = to_x if to_total is None else to_x + to_total.to(to_x.dtype)
    to_scale = (g * wide * factors).reshape(-1, x.shape[-1]).sum(0) if trains else scale.new_empty(0)
    return to_x.to(x.dtype), to_scale


def _back_native(
    gradient: Tensor, to_total: Tensor | None, x: Tensor, scale: Tensor, factors: Tensor, trains: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = factors.numel(), x.shape[-1]
    chunks = -(-rows // CHUNK_ROWS)
    to_x, partial = torch.empty_like(x), torch.empty(chunks, columns) if trains else None
    call, wide = native_function("elementwise", "normalize_rows_back"), x.dtype is torch.float32

    def back_part(start: int, end: int) -> None:
        call(gradient, x, wide, scale, factors, to_total, start, end, rows, columns, to_x, partial)

    run_parts(chunks, 1, back_part)
    return to_x, scale.new_empty(0) if partial is None else partial.sum(0)


@jit
def normalize_back_kernel(
    gradient: Any, to_total: Any, x: Any, scale: Any, factors: Any, to_x: Any, partial: Any, rows: Any, columns: Any,
    summed: tl.constexpr, trains: tl.constexpr, chunk: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes `chunk` rows, and their part of the weight's gradient."""
    program = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, size)
    inside = place < columns
    weight = tl.load(scale + place, mask=inside, other=0.0)
    part = tl.zeros((size,), tl.float32)
    for row in range(program * chunk, tl.minimum(program * chunk + chunk, rows)):
        base = row * columns
        g = tl.load(gradient + base + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + base + place, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(factors + row)
        m = g * weight
        part += g * value * factor
        made = factor * (m - value * (tl.sum(m * value, 0) / columns * factor * factor))
        if summed:
            made += tl.load(to_total + base + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_x + base + place, made.to(to_x.dtype.element_ty), mask=inside)
    if trains:
        tl.store(partial + program * columns + place, part, mask=inside)


def _back_triton(
    gradient: Tensor, to_total: Tensor | None, x: Tensor, scale: Tensor, factors: Tensor, trains: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = factors.numel(), x.shape[-1]
    programs = -(-rows // CHUNK_ROWS)
    to_x, partial = torch.empty_like(x), torch.empty(programs if trains else 0, columns, device=x.device)
    given = (gradient, x if to_total is None else to_total, x, scale, factors, to_x, partial, rows, columns)
    fixed = (to_total is not None, trains, CHUNK_ROWS, triton.next_power_of_2(columns))
    normalize_back_kernel[(programs,)](*given, *fixed)
    return to_x, partial.sum(0) if trains else scale.new_empty(0)


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in NATIVE and 0 < x.shape[-1] <= WIDEST and x.numel() > 0


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, ...]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0) if residual is None else torch.empty_like(out)
    return out, total, x.new_empty((*x.shape[:-1], 1), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, ctx.offset = inputs
    _, total, factors = output
    ctx.mark_non_differentiable(factors)
    ctx.summed = residual is not None
    ctx.save_for_backward((total if ctx.summed else x).contiguous(), weight, factors)


def _backward(ctx: Any, gradient: Tensor, to_total: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, factors = ctx.saved_tensors
    trains = ctx.needs_input_grad[2]
    to_x, to_weight = BACKWARD(gradient, to_total if ctx.summed else None, x, weight, factors, ctx.offset, trains)
    return to_x, to_x if ctx.summed else None, to_weight if trains else None, None, None


BACKWARD = register_operation(
    "normalize_rms_back(Tensor gradient, Tensor? to_total, Tensor x, Tensor weight, Tensor factors, float offset, "
    "bool trains) -> (Tensor, Tensor)",
    _normalize_back,
    lambda gradient, to_total, x, weight, factors, offset, trains: (
        torch.empty_like(x),
        torch.empty_like(weight) if trains else weight.new_empty(0),
    ),
)
FORWARD = register_operation(
    "normalize_rms(Tensor x, Tensor? residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    _normalize,
    _fake,
    _save,
    _backward,
)
