"""Optimizer steps: AdamW with moments in 8 bits or float32, and stochastic rounding of bfloat16 parameters."""

from luthier_kernels.optimizers.optimizers import AdamW, AdamW8bit
from luthier_kernels.optimizers.steps import step_eight_bits, step_floats

__all__ = ["AdamW", "AdamW8bit", "step_eight_bits", "step_floats"]
