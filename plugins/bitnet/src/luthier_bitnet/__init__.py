"""What luthier-bitnet offers, described without importing torch: quantizers `ternary` and `bitnet`, an exporter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from luthier import ExporterRecord, QuantizerRecord, hookimpl

from luthier_bitnet.options import Bitnet, Packed, Schedule, Ternary

__version__ = "0.1.0"
__all__ = [
    "Bitnet",
    "Packed",
    "Schedule",
    "Ternary",
    "luthier_exporters",
    "luthier_quantizers",
    "measure_layers",
    "save_packed",
]


@hookimpl
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    build = "luthier_bitnet.quantizer:TernaryQuantizer"
    tags = ("dense-weights", "quantized-base")
    return [
        QuantizerRecord(
            name="ternary",
            summary="Linear weights trained to -s, 0 and s (1.58 bits); activations as they are.",
            options=Ternary,
            build=build,
            bits=1.58,
            tolerance=0.6,
            trains=True,
            provides=tags,
        ),
        QuantizerRecord(
            name="bitnet",
            summary="Ternary weights with int8 activations for each token (BitNet b1.58), multiplied as integers.",
            options=Bitnet,
            build=build,
            bits=1.58,
            tolerance=0.6,
            trains=True,
            mergeable=False,
            provides=tags,
        ),
    ]


@hookimpl
def luthier_exporters() -> Iterable[ExporterRecord]:
    return [
        ExporterRecord(
            name="bitnet_packed",
            summary="transformers' packed BitNet checkpoint, two bits a weight, of what quantizer bitnet trained.",
            options=Packed,
            build="luthier_bitnet.exporter:PackedExporter",
            quantized=True,
        )
    ]


def save_packed(model: Any, folder: str | Path, convention: Literal["divide", "multiply"] = "divide") -> None:
    """Write a trained `bitnet` model in two bits a weight, as transformers' BitNet checkpoints have it."""
    from luthier_bitnet.packed import write_packed

    write_packed(model, Path(folder), convention)


def measure_layers(model: Any) -> dict[str, dict[str, float]]:
    """Return for each ternary layer how far its weights are from the latent ones, and how many of them are zero."""
    from luthier_bitnet.measures import measure_layer
    from luthier_bitnet.quantizer import find_layers

    return {path: measure_layer(layer) for path, layer in find_layers(model).items()}
