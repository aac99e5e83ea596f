"""The engine's operations computed by this package: which calls each takes, and how it is called.

Other calls get NotImplemented, and the engine computes them: inputs of a dtype that the result does not have, a head
that trains, for which the engine has a form with one matrix product less, or attention with a window, a soft cap, a
prefix or many short documents that continue a long one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luthier_kernels.attention import attend_documents, is_fast
from luthier_kernels.attention.chains import attend_chains
from luthier_kernels.attention.documents import GRAIN
from luthier_kernels.attention.documents import WIDEST as WIDEST_HEAD
from luthier_kernels.elementwise import add_and_normalize, gate_states, normalize_rms, rotate_heads
from luthier_kernels.elementwise.norm import WIDEST
from luthier_kernels.gpu import triton
from luthier_kernels.head import score_labels
from luthier_kernels.native import has_native

SMALLEST = 2**15  # elements; below, calling a registered operation costs more than it saves
HALVES = (torch.bfloat16, torch.float16)
NATIVE = (torch.float32, torch.bfloat16)


def takes_rows(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Return True for norms and rotations on a processor (in C) or a GPU (in Triton)."""
    if not 0 < shape[-1] <= WIDEST or math.prod(shape) < SMALLEST:
        return False
    if device.type == "cpu":
        return dtype in NATIVE and has_native("elementwise")
    return _takes_triton(device, dtype)


def takes_swiglu(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Return True for SwiGLU on a GPU, or on a processor in bfloat16; in float32 the engine compiles a faster form."""
    if device.type == "cpu":
        return dtype is torch.bfloat16 and math.prod(shape) >= SMALLEST and has_native("elementwise")
    return math.prod(shape) >= SMALLEST and _takes_triton(device, dtype)


def takes_geglu(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Return True for GeGLU on a GPU. On a processor the engine's compiled form is faster."""
    return math.prod(shape) >= SMALLEST and _takes_triton(device, dtype)


def takes_head(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Return True for the head on a GPU, or on a processor in bfloat16: in float32 nothing is gained there."""
    if not math.prod(shape):
        return False
    if device.type == "cpu":
        return dtype is torch.bfloat16 and has_native("head")
    return _takes_triton(device, dtype)


def takes_attention(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Return True for attention on a processor that multiplies bfloat16 by itself."""
    fits = shape[-1] % GRAIN == 0 and 0 < shape[-1] <= WIDEST_HEAD and math.prod(shape) > 0
    return fits and device.type == "cpu" and dtype is torch.bfloat16 and is_fast()


def build_norm(options: object) -> Callable[..., Any]:
    return _normalize


def build_sum_norm(options: object) -> Callable[..., Any]:
    return _add_and_normalize


def build_rotation(options: object) -> Callable[..., Any]:
    return _rotate


def build_swiglu(options: object) -> Callable[..., Any]:
    return lambda gate, up: _gate(gate, up, "silu")


def build_geglu(options: object) -> Callable[..., Any]:
    return lambda gate, up: _gate(gate, up, "gelu")


def build_head(options: object) -> Callable[..., Any]:
    return _score


def build_attention(options: object) -> Callable[..., Any]:
    return _attend


def _takes_triton(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and triton is not None and dtype in (torch.float32, *HALVES)


def _normalize(x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool, dtype: torch.dtype | None) -> Any:
    if not _keeps_dtype(x, weight, rounded, dtype):
        return NotImplemented
    return normalize_rms(x, weight, eps, offset)


def _add_and_normalize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    rounded: bool,
    dtype: torch.dtype | None,
) -> Any:
    if not _keeps_dtype(x, weight, rounded, dtype):
        return NotImplemented
    if residual is None:
        return x, normalize_rms(x, weight, eps, offset)
    if residual.dtype is not x.dtype or residual.shape != x.shape:
        return NotImplemented
    normed, total = add_and_normalize(x, residual, weight, eps, offset)
    return total, normed


def _keeps_dtype(x: Tensor, weight: Tensor, rounded: bool, dtype: torch.dtype | None) -> bool:
    usual = torch.promote_types(x.dtype, weight.dtype) if rounded else x.dtype
    return (dtype or usual) is x.dtype


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None) -> Any:
    made = {dtype or torch.promote_types(heads.dtype, cos.dtype) for heads in (query, key)}
    if made != {query.dtype} or key.dtype is not query.dtype or cos.requires_grad or sin.requires_grad:
        return NotImplemented
    batch, _, tokens, size = query.shape
    places = torch.arange(batch * tokens, device=query.device)
    cosines, sines = (table.expand(batch, tokens, size).reshape(-1, size) for table in (cos, sin))
    turned = []
    for heads in (query, key):
        flat = heads.transpose(1, 2).reshape(batch * tokens, -1, size)
        turned.append(rotate_heads(flat, cosines, sines, places).view(batch, tokens, -1, size).transpose(1, 2))
    return tuple(turned)


def _gate(gate: Tensor, up: Tensor, kind: str) -> Any:
    if gate.dtype is not up.dtype or gate.shape != up.shape:
        return NotImplemented
    return gate_states(gate, up, kind)


def _score(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, cap: float | None) -> Any:
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and trains:
        return NotImplemented
    return score_labels(states, weight, bias, labels, scale, cap)


def _attend(query: Tensor, key: Tensor, value: Tensor, document_starts: Tensor, *rest: Any) -> Any:
    continues, scale, window, cap = rest
    plain = window is None and cap is None
    alike = key.dtype is query.dtype and value.dtype is query.dtype and value.shape == key.shape
    if not plain or not alike or key.shape[2] != query.shape[2]:
        return NotImplemented
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if continues is None or bool((continues < 0).all()):
        return attend_documents(queries, keys, values, document_starts, scale)[None]
    result = attend_chains(queries, keys, values, document_starts.tolist(), continues.tolist(), scale)
    return NotImplemented if result is None else result[None]
