"""The quantizer `int8`: it replaces the linear layers of a model by int8 ones."""

from __future__ import annotations

from luthier import Context, LuthierError, get_logger, replace_dense_layers
from torch import Tensor, nn

from luthier_int8 import Int8
from luthier_int8.layer import Int8Linear

log = get_logger()


class Int8Quantizer:
    """A quantizer for the linear layers. Embeddings, norms, tied weights and `skip_modules` stay exact."""

    def __init__(self, options: Int8) -> None:
        self.options = options

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Replace each chosen layer by an `Int8Linear`, in place. A second call changes nothing.

        Raises `model-target` if an entry of `skip_modules` names no module, `part-unsupported` if no layer is chosen or
        the model is quantized already, and `int8:nonfinite-weight` if a weight holds NaN or infinity.
        """
        count = replace_dense_layers(
            model, context, "int8", self.options.skip_modules, Int8Linear,
            lambda layer: Int8Linear.of(layer, self.options.group_size), "int8:nonfinite-weight",
        )  # fmt: skip
        exact = sum(parameter.numel() for parameter in model.parameters())
        log.info("quantized to int8", layers=count, weights=_weights(model), left_exact=exact)
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        return layer.dense() if isinstance(layer, Int8Linear) else None

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Quantize a weight [out, in] into an `Int8Linear`, in place."""
        if not isinstance(layer, Int8Linear):
            raise LuthierError(
                "part-unsupported", "this is not a layer of quantizer 'int8'", found=type(layer).__name__
            )
        layer.put(weight)


def _weights(model: nn.Module) -> int:
    """Return the number of int8 weights of a model."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, Int8Linear))
