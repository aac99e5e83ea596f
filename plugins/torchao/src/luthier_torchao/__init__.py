"""What luthier-torchao offers, without importing torch: int8 and int4 bases, float8 training, and optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import attrs
from luthier import OptimizerRecord, QuantizerRecord, hookimpl, option

__version__ = "0.1.0"
__all__ = ["AdamW4bit", "AdamW8bit", "AdamWFp8", "TorchaoFloat8", "TorchaoInt4", "TorchaoInt8", "luthier_optimizers",
           "luthier_quantizers"]  # fmt: skip
SKIPPED = "Modules that stay exact, besides the output head, with all their parts: names, or whole parts of names."
GROUPS = (32, 64, 128, 256)


@attrs.frozen(kw_only=True)
class TorchaoInt8:
    """Options of the quantizer `torchao.int8`."""

    skip_modules: list[str] = option(factory=list, help=SKIPPED)


@attrs.frozen(kw_only=True)
class TorchaoInt4:
    """Options of the quantizer `torchao.int4`."""

    group_size: int = option(
        32, help="Number of weights of a row that share a scale. Smaller is more exact.", choices=GROUPS
    )
    mapping: Literal["asymmetric", "symmetric"] = option(
        "asymmetric", help="Codes of a group span its values, or lie evenly around zero."
    )
    skip_modules: list[str] = option(factory=list, help=SKIPPED)


@attrs.frozen(kw_only=True)
class TorchaoFloat8:
    """Options of the quantizer `torchao.float8`."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = option(
        "tensorwise",
        help="The numbers that share a scale: a whole tensor, or a row; `_with_gw_hp` computes the gradient of weights "
        "without rounding.",
    )
    emulate: bool = option(
        False, help="Round to float8 but multiply in float32: for devices without such products; it gains no time."
    )
    skip_modules: list[str] = option(factory=list, help=SKIPPED)


@attrs.frozen(kw_only=True)
class AdamW8bit:
    """Options of the optimizer `torchao.adamw_8bit`."""

    betas: tuple[float, float] = option((0.9, 0.999), help="Decays of the two moments.", low=0.0, high=0.9999)
    eps: float = option(1e-8, help="Added to the root of the second moment.", low=1e-12)
    weight_decay: float = option(0.0, help="Decoupled weight decay.", low=0.0)


@attrs.frozen(kw_only=True)
class AdamW4bit(AdamW8bit):
    """Options of the optimizer `torchao.adamw_4bit`."""


@attrs.frozen(kw_only=True)
class AdamWFp8(AdamW8bit):
    """Options of the optimizer `torchao.adamw_fp8`."""


@hookimpl
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    return [
        _quantizer("torchao.int8", TorchaoInt8, 8, 0.02, "The base's linear weights in torchao's int8, by rows."),
        _quantizer("torchao.int4", TorchaoInt4, 4, 0.2, "The base's linear weights in torchao's int4, by groups."),
        QuantizerRecord(
            name="torchao.float8",
            summary="Training multiplies in torchao's float8; weights stay exact, and so does evaluation.",
            options=TorchaoFloat8,
            build="luthier_torchao.float8_quantizer:Float8Quantizer",
            bits=32,
            tolerance=0.06,
            provides=("dense-weights", "quantized-base"),
        ),
    ]


@hookimpl
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    return [
        _optimizer(
            "torchao.adamw_8bit", AdamW8bit, "torchao's AdamW with both moments in 8 bits: 2.03 bytes a weight."
        ),
        _optimizer(
            "torchao.adamw_4bit", AdamW4bit, "torchao's AdamW with both moments in 4 bits: 1.06 bytes a weight."
        ),
        _optimizer("torchao.adamw_fp8", AdamWFp8, "torchao's AdamW with both moments in float8: 2.03 bytes a weight."),
    ]


def _quantizer(name: str, options: type[Any], bits: int, tolerance: float, summary: str) -> QuantizerRecord:
    return QuantizerRecord(
        name=name,
        summary=summary,
        options=options,
        build="luthier_torchao.quantizer:TorchaoQuantizer",
        bits=bits,
        tolerance=tolerance,
        provides="quantized-base",
    )


def _optimizer(name: str, options: type[Any], summary: str) -> OptimizerRecord:
    build = "luthier_torchao.optimizers:TorchaoOptimizer"
    return OptimizerRecord(name=name, summary=summary, options=options, build=build)
