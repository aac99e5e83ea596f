"""Int8 quantization of activations, token by token: states are about codes * steps (BitNet b1.58, arXiv 2402.17764).

States [..., in] are float32, bfloat16, float16 or float64; codes are [..., in] int8 and steps [..., 1] float32. A step
is absmax / 127 (absmax at least 1e-5), a code is round(x * (127 / absmax)), ties to even, computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier_kernels.dispatch import run_first
from luthier_kernels.gpu import jit, runs_triton, tl, triton
from luthier_kernels.native import has_native, native_function, run_parts
from luthier_kernels.registration import register_operation
from luthier_kernels.ternary.groups import as_native

SMALLEST = 1e-5
GRAIN = 1 << 15


def quantize_activations(states: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [..., in] int8 and steps [..., 1] float32. They have no gradient: see `multiply_ternary`."""
    return OPERATION(states.detach())


def reference_quantize(states: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same in plain torch, in float64 for float64 states, otherwise in float32."""
    states = states if states.dtype is torch.float64 else states.float()
    largest = states.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    levels = torch.full_like(largest, 127.0)  # a tensor: torch multiplies by the reciprocal when it divides by a number
    return (states * (levels / largest)).round().to(torch.int8), largest / levels


def _quantize_native(states: Tensor) -> tuple[Tensor, Tensor]:
    states, wide = as_native(states)
    codes = torch.empty(states.shape, dtype=torch.int8)
    steps = torch.empty(*states.shape[:-1], 1, dtype=torch.float32)
    call, columns = native_function("ternary", "quantize_rows"), states.shape[-1]

    def quantize_part(start: int, end: int) -> None:
        call(states, wide, start, end, columns, codes, steps)

    run_parts(steps.numel(), -(-GRAIN // columns), quantize_part)
    return codes, steps


@jit
def quantize_rows_kernel(states: Any, codes: Any, steps: Any, columns: Any, size: tl.constexpr) -> None:
    """Each program computes one row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, size)
    inside = place < columns
    value = tl.load(states + row * columns + place, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), 0), 1e-5)
    scaled = value * tl.div_rn(127.0, largest)
    rounded = (scaled + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to the nearest integer, ties to even
    tl.store(codes + row * columns + place, rounded.to(tl.int8), mask=inside)
    tl.store(steps + row, tl.div_rn(largest, 127.0))


def _quantize_triton(states: Tensor) -> tuple[Tensor, Tensor]:
    states = states.contiguous()
    codes = torch.empty(states.shape, dtype=torch.int8, device=states.device)
    steps = torch.empty(*states.shape[:-1], 1, dtype=torch.float32, device=states.device)
    columns = states.shape[-1]
    size = triton.next_power_of_2(columns)
    quantize_rows_kernel[(steps.numel(),)](states, codes, steps, columns, size=size, enable_fp_fusion=False)
    return codes, steps


def quantize_rows(states: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `quantize_activations` inside another operation, without its way through torch's dispatcher."""
    if states.numel() == 0:
        steps = torch.full((*states.shape[:-1], 1), SMALLEST / 127.0, device=states.device)
        return torch.empty(states.shape, dtype=torch.int8, device=states.device), steps
    single = states.dtype is not torch.float64
    native = single and states.device.type == "cpu" and has_native("ternary")
    codes, steps = run_first(
        "quantize_activations",
        ("triton", single and runs_triton(states) and states.shape[-1] <= 65536, lambda: _quantize_triton(states)),
        ("native", native, lambda: _quantize_native(states)),
        ("torch", True, lambda: reference_quantize(states)),
    )
    return codes, steps.float()


def _fake(states: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(states, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, states.new_empty((*states.shape[:-1], 1), dtype=torch.float32)


OPERATION = register_operation("quantize_activations(Tensor states) -> (Tensor, Tensor)", quantize_rows, _fake)
