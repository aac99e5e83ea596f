"""The duration of a run: the operations that a rehearsal counted, at a rate that was measured on the device."""

from __future__ import annotations

import time
from typing import Any, Final

import torch

SHARE: Final = 0.4  # assumed share of one large product's rate that a whole step reaches
SIDES: Final = {"cuda": 8192}  # the size of that product
REPEATS: Final = 3


def product_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations a second of one large matrix product here, the best of three, and what was measured."""
    side = SIDES.get(device.type, 1024)
    a = torch.ones(side, side, device=device, dtype=dtype)
    seconds = min(_timed(a) for _ in range(REPEATS + 1))
    name = str(dtype).removeprefix("torch.")
    return 2 * side**3 / seconds, f"a {name} product of {side:,} x {side:,} matrices, measured on this {device.type}"


def estimate_duration(
    flops_per_token: float, tokens: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the seconds of `tokens` trained tokens, with everything that the number rests on."""
    rate, measured = product_rate(device, dtype)
    return {
        "seconds": flops_per_token * tokens / (rate * SHARE),
        "tokens_per_second": rate * SHARE / flops_per_token,
        "flops_per_token": flops_per_token,
        "rate": rate,
        "rate_from": measured,
        "share": SHARE,
        "share_from": "assumed",
    }


def _timed(a: torch.Tensor) -> float:
    began = time.perf_counter()
    a @ a
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return max(time.perf_counter() - began, 1e-9)
