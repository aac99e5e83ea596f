"""Optimizer steps: AdamW with moments in 8 bits or in float32, and rounding of bfloat16 parameters at random."""

from luthier_kernels.optimizers.optimizers import AdamW, AdamW8bit
from luthier_kernels.optimizers.steps import step_eight_bits, step_floats

__all__ = ["AdamW", "AdamW8bit", "step_eight_bits", "step_floats"]
