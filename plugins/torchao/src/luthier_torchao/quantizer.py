"""The quantizers `torchao.int8` and `torchao.int4`: they replace linear layers by torchao's formats."""

from __future__ import annotations

import functools
from typing import Any

from luthier import Context, LuthierError, get_logger, replace_dense_layers
from torch import Tensor, nn

from luthier_torchao import TorchaoInt4, TorchaoInt8
from luthier_torchao.layer import Form, TorchaoLinear

log = get_logger()


class TorchaoQuantizer:
    """A quantizer for the linear layers. Tied weights and `skip_modules` stay exact."""

    def __init__(self, options: TorchaoInt8 | TorchaoInt4) -> None:
        self.options = options
        if isinstance(options, TorchaoInt4):
            self.form = Form(bits=4, group_size=options.group_size, mapping=options.mapping)
        else:
            self.form = Form(bits=8)
        self.name = f"torchao.int{self.form.bits}"

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Replace each chosen layer by a `TorchaoLinear`, in place. A second call changes nothing.

        Raises `model-target` if an entry of `skip_modules` names no module, `part-unsupported` if no layer is chosen or
        the model is quantized already, and `torchao:nonfinite-weight` if a weight holds NaN or infinity.
        """
        make = functools.partial(self._quantized, has_values=context.has_values)
        count = replace_dense_layers(
            model, context, self.name, self.options.skip_modules, TorchaoLinear, make, "torchao:nonfinite-weight"
        )
        log.info(f"quantized to {self.name}", layers=count)
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        return layer.dense() if isinstance(layer, TorchaoLinear) else None

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Quantize a weight [out, in] into a layer of this quantizer, in place."""
        if not isinstance(layer, TorchaoLinear):
            problem = f"this is not a layer of quantizer '{self.name}'"
            raise LuthierError("part-unsupported", problem, found=type(layer).__name__)
        layer.put(weight)

    def _quantized(self, layer: Any, has_values: bool) -> TorchaoLinear:
        made = TorchaoLinear(layer, self.form)
        if has_values:
            made.put(layer.weight.T if made.transposed else layer.weight)
        return made
