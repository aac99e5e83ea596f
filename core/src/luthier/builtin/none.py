"""No quantizer: the base model's weights as they were loaded, dense or in the form that its checkpoint has."""

from __future__ import annotations

from typing import Any

from luthier.errors import LuthierError
from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.contracts.values import Context
from luthier.plugins.records import NoOptions


class Unquantized(Quantizer):
    """Keeps the `Quantizer` protocol; its layers are those of a checkpoint that another tool has quantized."""

    def __init__(self, options: NoOptions) -> None:
        self.options = options

    def apply(self, model: Any, context: Context) -> Any:
        from luthier.model.weights.stored_layers import StoredLinear, open_stored

        model = open_stored(model, context.has_values)
        stored = (layer for layer in model.modules() if isinstance(layer, StoredLinear))
        self.mergeable = not any(layer.rounds_activations for layer in stored)  # plain layers do not round activations
        return model

    def dequantize(self, layer: Any) -> Any:
        from luthier.model.weights.stored_layers import StoredLinear

        return layer.dense() if isinstance(layer, StoredLinear) else None

    def requantize(self, layer: Any, weight: Any) -> None:
        problem, remedy = "a checkpoint's own quantized layers take no other weight", "Begin from its dense original."
        raise LuthierError("part-unsupported", problem, found=type(layer).__name__, remedy=remedy)
