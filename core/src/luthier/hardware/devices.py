"""Devices: those of this machine, and the choice or refusal of the one that a run asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from luthier.errors import LuthierError

GONE: Final = (  # phrases in the messages of CUDA's runtime and driver, and of Apple's Metal
    "no CUDA-capable device is detected",
    "CUDA-capable device(s) is/are busy or unavailable",
    "invalid device ordinal",
    "GPU is lost",
    "fallen off the bus",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "unspecified launch failure",
    "hardware stack error",
    "CUDA error: unknown error",
    "Device Removed",
)


def choose_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises `device-unavailable` if it is not here."""
    if name == "auto":
        return torch.device(list_devices()[-1])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _refused(name, "no such device") from None
    if device.type not in {d.split(":")[0] for d in list_devices()}:
        raise _refused(name, f"torch {torch.__version__} sees no {device.type} here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _refused(name, f"there are {torch.cuda.device_count()} CUDA devices")
    return device


def list_devices() -> list[str]:
    """Return the devices that torch sees, the preferred one last."""
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in reversed(range(torch.cuda.device_count()))]
    return devices


def is_gone(error: BaseException) -> bool:
    """Return True if an error of torch's means that the device itself is gone, and not that a kernel failed on it."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in GONE)


def device_lost(error: BaseException, device: torch.device, step: int, checkpoint: Path | None) -> LuthierError:
    """Return the error `device-lost`, which says what the run has left on disk."""
    reason = str(error).splitlines()[0].strip(" .")
    remedy_start = f"The newest checkpoint is {checkpoint}" if checkpoint else "No checkpoint has been written yet"
    remedy = f"{remedy_start}. Once the device is back (nvidia-smi shows this for CUDA), run the same command again."
    return LuthierError("device-lost", f"it stopped answering at step {step}: {reason}", where=str(device),
                        remedy=remedy)  # fmt: skip


def _refused(name: str, problem: str) -> LuthierError:
    remedy = f"This machine has: auto, {', '.join(list_devices())}."
    return LuthierError("device-unavailable", problem, where="device", found=name, remedy=remedy)
