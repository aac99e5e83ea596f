"""The quantizers `bnb.nf4`, `bnb.fp4` and `bnb.int8`: they replace linear layers by bitsandbytes' formats."""

from __future__ import annotations

from typing import Any

from luthier import Context, LuthierError, check_finite_weights, choose_dense_layers, get_logger
from torch import Tensor, nn

from luthier_bitsandbytes import BnbFp4, BnbInt8, BnbNf4
from luthier_bitsandbytes.layer import BnbLinear, Form

log = get_logger()


class BnbQuantizer:
    """A quantizer for the linear layers. Tied weights and `skip_modules` stay exact."""

    def __init__(self, options: BnbNf4 | BnbInt8) -> None:
        self.options = options
        if isinstance(options, BnbInt8):
            self.form = Form(kind="int8")
        else:
            kind = "fp4" if isinstance(options, BnbFp4) else "nf4"
            self.form = Form(kind=kind, block_size=options.block_size, nested=options.use_double_quant)
        self.name = f"bnb.{self.form.kind}"

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Replace each chosen layer by a `BnbLinear`, in place. A second call changes nothing.

        Raises `model-target` if an entry of `skip_modules` names no module, `part-unsupported` if no layer is chosen or
        the model is quantized already, and `bitsandbytes:nonfinite-weight` if a weight holds NaN or infinity.
        """
        chosen = choose_dense_layers(model, self.name, self.options.skip_modules)
        if not chosen and not any(isinstance(m, BnbLinear) for m in model.modules()):
            problem = f"quantizer '{self.name}' finds no linear layer to quantize"
            raise LuthierError("part-unsupported", problem, where=type(model).__name__)
        if context.has_values:
            check_finite_weights(chosen, "bitsandbytes:nonfinite-weight")
        advance = context.progress(len(chosen), f"quantizing to {self.name}")
        made: dict[int, BnbLinear] = {}  # a layer that is used in two places stays one layer
        for path, layer in chosen.items():
            if id(layer) not in made:
                made[id(layer)] = self._quantized(layer, context.has_values)
            model.set_submodule(path, made[id(layer)])
            advance()
        log.info(f"quantized to {self.name}", layers=len(made))
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        return layer.dense() if isinstance(layer, BnbLinear) else None

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Quantize a weight [out, in] into a layer of this quantizer, in place."""
        if not isinstance(layer, BnbLinear):
            problem = f"this is not a layer of quantizer '{self.name}'"
            raise LuthierError("part-unsupported", problem, found=type(layer).__name__)
        layer.put(weight)

    def _quantized(self, layer: Any, has_values: bool) -> BnbLinear:
        made = BnbLinear(layer, self.form)
        if has_values:
            made.put(layer.weight.T if made.transposed else layer.weight)
        return made
