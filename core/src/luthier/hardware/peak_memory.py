"""The most memory that this process has used so far."""

from __future__ import annotations

import resource
import sys

import torch


def process_memory(device: torch.device) -> int | None:
    """Return the bytes that this process has used besides tensors: libraries and the allocator's own.

    It holds for a process that has made no tensors yet. None on a GPU, where libraries are not in the device's memory.
    """
    return peak_memory(device) if device.type == "cpu" else None


def peak_memory(device: torch.device) -> int:
    """Return the peak so far in bytes: of memory allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
