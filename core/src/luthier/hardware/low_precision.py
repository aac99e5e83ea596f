"""Low-precision arithmetic: the dtypes that a device computes in natively, and those it emulates, many times slower."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Final

import torch

CPUINFO: Final = Path("/proc/cpuinfo")
FEATURES: Final = ("amx_bf16", "avx512_bf16", "bf16")  # the names of bfloat16 instructions, x86's and ARM's


def bf16_feature(device: torch.device) -> str | None:
    """Return the name of what computes in bfloat16 on this device, or None if nothing does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    flags = processor_flags()
    return next((name for name in FEATURES if name in flags), None)


def imitates_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if products in this dtype are emulated here, and so many times slower than in float32."""
    if dtype is torch.bfloat16:
        return device.type in ("cpu", "cuda") and bf16_feature(device) is None
    return dtype is torch.float16 and device.type == "cpu"


def processor_flags(path: Path | None = None) -> frozenset[str]:
    """Return the feature flags of the processor on Linux; an empty set elsewhere. `path` None: the system's."""
    return _read_flags(path or CPUINFO)


@functools.cache
def _read_flags(path: Path) -> frozenset[str]:
    with contextlib.suppress(OSError):
        for line in path.read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()
