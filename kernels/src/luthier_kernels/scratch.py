"""Memory that an operation uses during one call, and the next call reuses."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_kept = threading.local()


def borrow_scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device, use: str = "weight") -> Tensor:
    """Return uninitialised memory of this shape. Calls of one thread (and CUDA stream) share it, for each `use`.

    The next call overwrites it: never keep or return it. It grows to the largest size requested.
    """
    buffers: dict[tuple[object, ...], Tensor] = _kept.__dict__.setdefault("buffers", {})
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key, size = (device, dtype, stream, use), math.prod(shape)
    if key not in buffers or buffers[key].numel() < size:
        buffers.pop(key, None)  # freed before the larger one is taken
        buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffers[key][:size].view(tuple(shape))


def free_scratch() -> None:
    """Free the buffers of this thread."""
    _kept.__dict__.pop("buffers", None)
