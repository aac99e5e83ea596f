"""The quantizers `nf4` and `fp4`: they replace linear layers by 4-bit ones."""

from __future__ import annotations

import functools
from typing import Any

from luthier import Context, LuthierError, get_logger, replace_dense_layers
from torch import Tensor, nn

from luthier_nf4 import Fp4, Nf4
from luthier_nf4.layer import Format, FourBitLinear

log = get_logger()


class FourBitQuantizer:
    """A quantizer for the linear layers. Embeddings, norms, tied weights and `skip_modules` stay exact."""

    def __init__(self, options: Nf4) -> None:
        self.options = options
        self.name = "fp4" if isinstance(options, Fp4) else "nf4"
        self.form = Format(kind=self.name, block_size=options.block_size, nested=options.use_double_quant)

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Replace each chosen layer by a `FourBitLinear`, in place. A second call changes nothing.

        Raises `model-target` if an entry of `skip_modules` names no module, `part-unsupported` if no layer is chosen or
        the model is quantized already, and `nf4:nonfinite-weight` if a weight holds NaN or infinity.
        """
        make = functools.partial(self._quantized, has_values=context.has_values)
        count = replace_dense_layers(
            model, context, self.name, self.options.skip_modules, FourBitLinear, make, "nf4:nonfinite-weight"
        )
        exact = sum(parameter.numel() for parameter in model.parameters())
        log.info(f"quantized to {self.name}", layers=count, weights=_count_weights(model), left_exact=exact)
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        return layer.dense() if isinstance(layer, FourBitLinear) else None

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Quantize a weight [out, in] into a layer of this quantizer, in place."""
        if not isinstance(layer, FourBitLinear):
            problem = f"this is not a layer of quantizer '{self.name}'"
            raise LuthierError("part-unsupported", problem, found=type(layer).__name__)
        layer.put(weight)

    def _quantized(self, layer: Any, has_values: bool) -> FourBitLinear:
        made = FourBitLinear(layer, self.form)
        if has_values:
            made.put(layer.weight.T if made.transposed else layer.weight)
        return made


def _count_weights(model: nn.Module) -> int:
    """Return the number of 4-bit weights of a model."""
    layers = [layer for layer in model.modules() if isinstance(layer, FourBitLinear)]
    return sum(layer.in_features * layer.out_features for layer in layers)
