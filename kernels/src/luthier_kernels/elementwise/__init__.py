"""Operations between matrix products: RMSNorm (with a residual, or to int8), rotary positions, gated activations."""

from luthier_kernels.elementwise.gates import gate_states
from luthier_kernels.elementwise.norm import add_and_normalize, normalize_quantized, normalize_rms
from luthier_kernels.elementwise.rope import rotate_heads

__all__ = ["add_and_normalize", "gate_states", "normalize_quantized", "normalize_rms", "rotate_heads"]
