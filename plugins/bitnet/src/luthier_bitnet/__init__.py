"""What luthier-bitnet offers, described without importing torch: four quantizers and an exporter."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from luthier import ExporterRecord, OptimizerRecord, QuantizerRecord, hookimpl

from luthier_bitnet.options import Bitnet, Packed, QatAdam, QatSgd, RangeTuning, Schedule, Ternary
from luthier_bitnet.uniform.options import Qat, QatActivations, Tuning

__version__ = "0.1.0"
__all__ = [
    "Bitnet",
    "Packed",
    "Qat",
    "QatActivations",
    "QatAdam",
    "QatSgd",
    "RangeTuning",
    "Schedule",
    "Ternary",
    "Tuning",
    "luthier_exporters",
    "luthier_optimizers",
    "luthier_quantizers",
    "measure_layers",
    "save_packed",
]


TAGS = ("dense-weights", "quantized-base")  # what each of them provides
ROUNDED = (*TAGS, "rounded-activations")


@hookimpl
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    return [*_ternary_records(), *_uniform_records()]


def _ternary_records() -> list[QuantizerRecord]:
    build = "luthier_bitnet.quantizer:TernaryQuantizer"
    return [
        QuantizerRecord(
            name="ternary",
            summary="Linear weights trained to -s, 0 and s (1.58 bits); activations stay as they are.",
            options=Ternary,
            build=build,
            bits=1.58,
            tolerance=0.6,
            trains=True,
            provides=TAGS,
        ),
        QuantizerRecord(
            name="bitnet",
            summary="Ternary weights and int8 activations (BitNet b1.58), multiplied as integers.",
            options=Bitnet,
            build=build,
            bits=1.58,
            tolerance=0.6,
            trains=True,
            mergeable=False,
            provides=ROUNDED,
        ),
    ]


def _uniform_records() -> list[QuantizerRecord]:
    return [
        QuantizerRecord(
            name="qat",
            summary="Linear weights trained to 8, 4, 2, 1.58 or 1 bits, with a choice of scale, gradient and schedule.",
            options=Qat,
            build="luthier_bitnet.uniform.quantizer:UniformQuantizer",
            bits=4,
            tolerance=0.99,
            trains=True,
            provides=TAGS,
        ),
        QuantizerRecord(
            name="qat_activations",
            summary="Quantizer qat with activations in 8, 4 or 2 bits, whose ranges follow each batch or are kept.",
            options=QatActivations,
            build="luthier_bitnet.uniform.quantizer:UniformQuantizer",
            bits=4,
            tolerance=0.99,
            trains=True,
            mergeable=False,
            provides=ROUNDED,
        ),
    ]


@hookimpl
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    build = "luthier_bitnet.optimizers:LatentOptimizer"
    adam, sgd = (
        f"torch's {name} with a rate of its own for latent weights, clipped by tensor." for name in ("Adam", "SGD")
    )
    return [
        OptimizerRecord(name="qat_adam", summary=adam, options=QatAdam, build=build),
        OptimizerRecord(name="qat_sgd", summary=sgd, options=QatSgd, build=build),
    ]


@hookimpl
def luthier_exporters() -> Iterable[ExporterRecord]:
    return [
        ExporterRecord(
            name="bitnet_packed",
            summary="transformers' packed BitNet checkpoint, two bits a weight, of a model trained with quantizer "
            "bitnet.",
            options=Packed,
            build="luthier_bitnet.exporter:PackedExporter",
            quantized=True,
        )
    ]


def save_packed(model: Any, folder: str | Path, convention: Literal["divide", "multiply"] = "divide") -> None:
    """Write a trained `bitnet` model with two bits a weight, as a BitNet checkpoint of transformers."""
    from luthier_bitnet.packed import write_packed

    write_packed(model, Path(folder), convention)


def measure_layers(model: Any) -> dict[str, dict[str, float]]:
    """Return, for each trained quantized layer, the distance to its latent weights and the share of zeros."""
    from luthier_bitnet.measures import measure_layers as measured

    return measured(model)
