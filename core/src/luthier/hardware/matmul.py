"""Float32 products on a CPU: the faster of torch's two libraries computes them if it is as exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

WIDE_ENOUGH: Final = 512  # the hidden size from which the whole step gains; below it, attention's small products lose
EXACT: Final = 2e-6  # relative error of a float32 product of 256 x 256 matrices, with a margin
DEFAULT: Final = "highest"


def choose_matmul(hidden: int) -> tuple[str, str]:
    """Return a setting of torch's `set_float32_matmul_precision`, and the reason.

    "medium" sends products to oneDNN, which uses AVX-512 on processors where MKL uses only AVX2. On a processor with
    AMX oneDNN would compute them in bfloat16, so its error is measured first.
    """
    if hidden < WIDE_ENOUGH:
        return DEFAULT, f"a hidden size of {hidden}, less than {WIDE_ENOUGH}, gains nothing from another library"
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return DEFAULT, "no AVX-512 that another library could make use of"
    error = error_of("medium")
    if error > EXACT:
        return DEFAULT, f"oneDNN's products would have a relative error of {error:.1g} here"
    return "medium", f"oneDNN with AVX-512, relative error {error:.1g}: float32's own"


def error_of(setting: str) -> float:
    """Return the relative error of one float32 product under a setting."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=random) for _ in range(2))
    exact = a.double() @ b.double()
    with computed_by(setting):
        return float(((a @ b).double() - exact).norm() / exact.norm())


@contextmanager
def computed_by(setting: str) -> Iterator[None]:
    """Compute float32 products under a setting within this context, and restore the caller's setting after it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
