"""The quantizers `bnb.nf4`, `bnb.fp4` and `bnb.int8`: they replace linear layers by bitsandbytes' formats."""

from __future__ import annotations

import functools
from typing import Any

from luthier import Context, LuthierError, get_logger, replace_dense_layers
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
        make = functools.partial(self._quantized, has_values=context.has_values)
        count = replace_dense_layers(
            model, context, self.name, self.options.skip_modules, BnbLinear, make, "bitsandbytes:nonfinite-weight"
        )
        log.info(f"quantized to {self.name}", layers=count)
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
