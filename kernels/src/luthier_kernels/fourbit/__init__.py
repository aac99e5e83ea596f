"""4-bit weights (NF4, FP4) in bitsandbytes' layout: quantization, nested scales, dequantization, linear layers."""

from luthier_kernels.fourbit.dequantize import dequantize_fourbit
from luthier_kernels.fourbit.linear import lend_fourbit, multiply_fourbit
from luthier_kernels.fourbit.nesting import nest_scales, unnest_scales
from luthier_kernels.fourbit.quantize import quantize_fourbit
from luthier_kernels.fourbit.state import FourBitWeight

__all__ = [
    "FourBitWeight",
    "dequantize_fourbit",
    "lend_fourbit",
    "multiply_fourbit",
    "nest_scales",
    "quantize_fourbit",
    "unnest_scales",
]
