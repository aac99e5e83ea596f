"""No quantizer: the base model's weights as they were loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.builtin import NoQuantizer
from luthier.plugins.values import Multipliers, Progress


class Unquantized:
    """Keeps the `Quantizer` protocol; no layer is its own."""

    def __init__(self, options: NoQuantizer) -> None:
        self.options = options

    def load_arguments(self) -> dict[str, Any]:
        return {}

    def apply(self, model: Any) -> Any:
        return model

    def dequantize(self, layer: Any) -> None:
        return None

    def requantize(self, layer: Any, weight: Any) -> None:
        raise AssertionError("no layer is quantized")

    def export(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def progressed(self, progress: Progress) -> Multipliers:
        return Multipliers()
