"""What luthier-onnx offers: the exporter `onnx`, described without importing torch."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from luthier import ExporterRecord, hookimpl, option

__version__ = "0.1.0"
__all__ = ["Onnx", "luthier_exporters"]


@attrs.frozen(kw_only=True)
class Onnx:
    """Options of the exporter `onnx`."""

    max_logit_error: float = option(
        1e-4, help="Largest accepted difference of logits (root mean square), relative to their spread.", low=0.0
    )


@hookimpl
def luthier_exporters() -> Iterable[ExporterRecord]:
    return [
        ExporterRecord(
            name="onnx",
            summary="An ONNX file in float32 for ONNX Runtime, with config and tokenizer.",
            options=Onnx,
            build="luthier_onnx.exporter:OnnxExporter",
        )
    ]
