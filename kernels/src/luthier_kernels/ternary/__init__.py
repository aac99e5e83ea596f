"""Ternary weights with int8 activations: quantization, the layer for training and for inference, packed layouts."""

from luthier_kernels.ternary.activations import quantize_activations
from luthier_kernels.ternary.expand import expand_codes
from luthier_kernels.ternary.linear import multiply_ternary
from luthier_kernels.ternary.packed import multiply_packed
from luthier_kernels.ternary.quantize import quantize_ternary

__all__ = ["expand_codes", "multiply_packed", "multiply_ternary", "quantize_activations", "quantize_ternary"]
