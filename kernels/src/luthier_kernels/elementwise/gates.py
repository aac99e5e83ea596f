"""Gated activations: act(gate) * up for gate and up [..., F] in float32, bfloat16, float16 or float64.

They are computed in float32 (float64 for float64) and rounded once. `act` is `silu` (SwiGLU, arXiv 2002.05202), `gelu`
(GeGLU, tanh form) or `relu2` (the squared ReLU of BitNet b1.58 2B4T, arXiv 2504.12285). Only gate and up are kept for
backward, which computes the activation again.
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

KINDS = ("silu", "gelu", "relu2")
NATIVE = (torch.float32, torch.bfloat16)
PART = 1024  # elements that C computes at a time
ROOT = 0.7978845608028654  # sqrt(2 / pi)
CUBE = 0.044715


def gate_states(gate: Tensor, up: Tensor, kind: str = "silu") -> Tensor:
    """Return act(gate) * up [..., F]."""
    if kind not in KINDS:
        raise ValueError(f"gate: expected one of {KINDS}, got {kind!r}")
    return FORWARD(gate, up, kind)


def reference_gate(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Compute the same in plain torch, which every implementation must match; float64 stays float64."""
    e, g = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (gate, up))
    acted = {"silu": F.silu, "gelu": lambda x: F.gelu(x, approximate="tanh"), "relu2": lambda x: F.relu(x).square()}
    return (acted[kind](e) * g).to(gate.dtype)


def _gate(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    triton = gate.numel() > 0 and gate.dtype is not torch.float64 and runs_triton(gate, up)
    return run_first(
        "gate_states",
        ("triton", triton, lambda: _gate_triton(gate, up, kind)),
        ("native", _is_native(gate, up), lambda: _gate_native(gate, up, kind)),
        ("torch", True, lambda: reference_gate(gate, up, kind)),
    )


def _gate_back(gradient: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    triton = gate.numel() > 0 and gate.dtype is not torch.float64 and runs_triton(gradient, gate, up)
    return run_first(
        "gate_states_back",
        ("triton", triton, lambda: _back_triton(gradient, gate, up, kind)),
        ("native", _is_native(gradient, gate, up), lambda: _back_native(gradient, gate, up, kind)),
        ("torch", True, lambda: _back_torch(gradient, gate, up, kind)),
    )


def _gate_native(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    out = torch.empty_like(gate)
    _call_native((None, gate, up), kind, (out, None, None))
    return out


def _back_native(gradient: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    _call_native((gradient, gate, up), kind, (None, to_gate, to_up))
    return to_gate, to_up


def _call_native(given: tuple[Tensor | None, Tensor, Tensor], kind: str, made: tuple[Tensor | None, ...]) -> None:
    call, total, wide = native_function("elementwise", "gate_values"), given[1].numel(), given[1].dtype is torch.float32
    number = KINDS.index(kind)
    run_parts(-(-total // PART), 32, lambda start, end: call(*given, wide, number, start, end, total, *made))


def _is_native(*tensors: Tensor) -> bool:
    first = tensors[0]
    alike = all(t.dtype is first.dtype and t.shape == first.shape for t in tensors)
    known = first.dtype in NATIVE and first.device.type == "cpu" and first.numel() > 0
    return alike and known and has_native("elementwise")


def _back_torch(gradient: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    d, e, g = gradient.to(wide), gate.to(wide), up.to(wide)
    if kind == "silu":
        s = torch.sigmoid(e)
        acted, slope = e * s, s * (1 + e * (1 - s))
    elif kind == "gelu":
        t = torch.tanh(ROOT * (e + CUBE * e.pow(3)))
        acted = 0.5 * e * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * e * (1 - t * t) * ROOT * (1 + 3 * CUBE * e * e)
    else:
        positive = F.relu(e)
        acted, slope = positive.square(), 2 * positive
    return (d * g * slope).to(gate.dtype), (d * acted).to(up.dtype)


@jit
def acted_and_slope(e: Any, kind: tl.constexpr) -> Any:
    """Return, inside a kernel, the activation of float32 values and its derivative."""
    if kind == "silu":
        s = 1.0 / (1.0 + tl.exp(-e))
        acted, slope = e * s, s * (1.0 + e * (1.0 - s))
    elif kind == "gelu":
        inner = 0.7978845608028654 * (e + 0.044715 * e * e * e)
        t = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
        acted = 0.5 * e * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * e * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * e * e)
    else:
        positive = tl.maximum(e, 0.0)
        acted, slope = positive * positive, 2.0 * positive
    return acted, slope


@jit
def gate_kernel(gate: Any, up: Any, out: Any, total: Any, kind: tl.constexpr, size: tl.constexpr) -> None:
    """Each program computes `size` neighbours."""
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < total
    acted, _ = acted_and_slope(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), kind)
    made = acted * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, made.to(out.dtype.element_ty), mask=inside)


@jit
def gate_back_kernel(
    gradient: Any, gate: Any, up: Any, to_gate: Any, to_up: Any, total: Any, kind: tl.constexpr, size: tl.constexpr
) -> None:
    """Each program computes `size` neighbours."""
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < total
    d = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    acted, slope = acted_and_slope(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), kind)
    tl.store(to_gate + place, (d * g * slope).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + place, (d * acted).to(to_up.dtype.element_ty), mask=inside)


def _gate_triton(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    out = torch.empty_like(gate)
    gate_kernel[(count_programs(gate.numel(), 1024),)](gate, up, out, gate.numel(), kind=kind, size=1024)
    return out


def _back_triton(gradient: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    given = (gradient, gate, up, to_gate, to_up, gate.numel())
    gate_back_kernel[(count_programs(gate.numel(), 1024),)](*given, kind=kind, size=1024)
    return to_gate, to_up


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *BACKWARD(gradient, *ctx.saved_tensors, ctx.kind), None


def _fake_back(gradient: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(gate, memory_format=dense), torch.empty_like(up, memory_format=dense)


BACKWARD = register_operation(
    "gate_states_back(Tensor gradient, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor)", _gate_back, _fake_back
)
FORWARD = register_operation(
    "gate_states(Tensor gate, Tensor up, str kind) -> Tensor",
    _gate,
    lambda gate, up, kind: torch.empty_like(gate, memory_format=torch.contiguous_format),
    _save,
    _backward,
)
