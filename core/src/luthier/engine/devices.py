"""Devices: what is here, and the one that a run asked for, honoured or refused."""

from __future__ import annotations

import torch

from luthier.errors import LuthierError


def choose(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `device-unavailable` where it is not here."""
    if name == "auto":
        return torch.device(available()[-1])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _refused(name, "no such device") from None
    if device.type not in {d.split(":")[0] for d in available()}:
        raise _refused(name, f"torch {torch.__version__} sees no {device.type} here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _refused(name, f"there are {torch.cuda.device_count()} CUDA devices")
    return device


def available() -> list[str]:
    """The devices that torch sees, the preferred one last."""
    found = ["cpu"]
    if torch.backends.mps.is_available():
        found.append("mps")
    if torch.cuda.is_available():
        found += [f"cuda:{i}" for i in reversed(range(torch.cuda.device_count()))]
    return found


def _refused(name: str, problem: str) -> LuthierError:
    remedy = f"Here are: auto, {', '.join(available())}."
    return LuthierError("device-unavailable", problem, where="device", found=name, remedy=remedy)
