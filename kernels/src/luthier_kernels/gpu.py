"""Triton, if it is installed: its language, its decorator, and the tensors that its kernels can take."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton at import: set it before


def jit(function: Callable[..., Any]) -> Any:
    """Decorate a kernel with `triton.jit`, or return it unchanged if Triton is not installed."""
    return function if triton is None else triton.jit(function)


def runs_triton(*tensors: Tensor) -> bool:
    """Return True if Triton kernels can take these tensors: on a GPU, or anywhere under its interpreter."""
    if triton is None:
        return False
    return INTERPRETED or all(tensor.is_cuda for tensor in tensors)


def count_programs(elements: int, size: int) -> int:
    """Return how many programs of `size` elements cover `elements`."""
    return -(-elements // size)
