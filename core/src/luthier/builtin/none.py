"""No quantizer: the base model's weights as they were loaded."""

from __future__ import annotations

from typing import Any

from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.contracts.values import Context
from luthier.plugins.records import NoOptions


class Unquantized(Quantizer):
    """Keeps the `Quantizer` protocol; no layer is its own."""

    def __init__(self, options: NoOptions) -> None:
        self.options = options

    def apply(self, model: Any, context: Context) -> Any:
        return model

    def dequantize(self, layer: Any) -> None:
        return None

    def requantize(self, layer: Any, weight: Any) -> None:
        raise AssertionError("no layer is quantized")
