"""Operations of low-bit training on processors (torch and C) and GPUs (Triton); it imports torch and triton only."""

from luthier_kernels.dispatch import count_runs, forget_runs, only_implementation
from luthier_kernels.fourbit import (
    FourBitWeight,
    dequantize_fourbit,
    multiply_fourbit,
    nest_scales,
    quantize_fourbit,
    unnest_scales,
)

__version__ = "0.1.0"

__all__ = [
    "FourBitWeight",
    "count_runs",
    "dequantize_fourbit",
    "forget_runs",
    "multiply_fourbit",
    "nest_scales",
    "only_implementation",
    "quantize_fourbit",
    "unnest_scales",
]
