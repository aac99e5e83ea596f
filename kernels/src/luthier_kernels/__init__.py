"""Operations of low-bit training on processors (torch and C) and GPUs (Triton). They depend on torch and Triton only.

Names are imported at their first use, because the plugin's module is in this package and must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier_kernels.dispatch import count_runs, forget_runs, only_implementation
    from luthier_kernels.fourbit import (
        FourBitWeight,
        dequantize_fourbit,
        lend_fourbit,
        multiply_fourbit,
        nest_scales,
        quantize_fourbit,
        unnest_scales,
    )
    from luthier_kernels.head import score_labels
    from luthier_kernels.ternary import (
        expand_codes,
        multiply_packed,
        multiply_ternary,
        quantize_activations,
        quantize_ternary,
    )

__version__ = "0.1.0"

__all__ = [
    "FourBitWeight",
    "count_runs",
    "dequantize_fourbit",
    "expand_codes",
    "forget_runs",
    "lend_fourbit",
    "multiply_fourbit",
    "multiply_packed",
    "multiply_ternary",
    "nest_scales",
    "only_implementation",
    "quantize_activations",
    "quantize_fourbit",
    "quantize_ternary",
    "score_labels",
    "unnest_scales",
]
MODULES = ("dispatch", "fourbit", "head", "ternary")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in MODULES:
            attribute = getattr(import_module(f"{__name__}.{module}"), name, None)
            if attribute is not None:
                globals()[name] = attribute
                return attribute
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
