"""The quantizers `nf4` and `fp4`: they replace linear layers by 4-bit ones."""

from __future__ import annotations

from typing import Any

from luthier import Context, LuthierError, check_finite_weights, choose_dense_layers, get_logger
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
        chosen = choose_dense_layers(model, self.name, self.options.skip_modules)
        if not chosen and not any(isinstance(m, FourBitLinear) for m in model.modules()):
            problem = f"quantizer '{self.name}' finds no linear layer to quantize"
            raise LuthierError("part-unsupported", problem, where=type(model).__name__)
        if context.has_values:
            check_finite_weights(chosen, "nf4:nonfinite-weight")
        advance = context.progress(len(chosen), f"quantizing to {self.name}")
        made: dict[int, FourBitLinear] = {}  # a layer that is used in two places stays one layer
        for path, layer in chosen.items():
            if id(layer) not in made:
                made[id(layer)] = self._quantized(layer, context.has_values)
            model.set_submodule(path, made[id(layer)])
            advance()
        exact = sum(parameter.numel() for parameter in model.parameters())
        log.info(f"quantized to {self.name}", layers=len(made), weights=_count_weights(model), left_exact=exact)
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
