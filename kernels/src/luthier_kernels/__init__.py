"""Operations of low-bit training on processors (torch and C) and GPUs (Triton); it imports torch and triton only."""

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
    "unnest_scales",
]
