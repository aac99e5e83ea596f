"""What luthier-bitsandbytes offers: base models in bitsandbytes' forms and its optimizers, without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
from luthier import OptimizerRecord, QuantizerRecord, hookimpl, option

__version__ = "0.1.0"
__all__ = ["AdamW8bit", "BnbFp4", "BnbInt8", "BnbNf4", "Lion8bit", "PagedAdamW8bit", "luthier_optimizers",
           "luthier_quantizers"]  # fmt: skip
SKIPPED = "Modules that stay exact, besides the output head, with all their parts: names, or whole parts of names."
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@attrs.frozen(kw_only=True)
class BnbNf4:
    """Options of the quantizer `bnb.nf4`."""

    block_size: int = option(64, help="Number of weights that share a scale. Smaller is more exact.", choices=BLOCKS)
    use_double_quant: bool = option(True, help="Store the scales in 8 bits: 4.13 bits a weight instead of 4.5.")
    skip_modules: list[str] = option(factory=list, help=SKIPPED)


@attrs.frozen(kw_only=True)
class BnbFp4(BnbNf4):
    """Options of the quantizer `bnb.fp4`."""


@attrs.frozen(kw_only=True)
class BnbInt8:
    """Options of the quantizer `bnb.int8`."""

    skip_modules: list[str] = option(factory=list, help=SKIPPED)


@attrs.frozen(kw_only=True)
class AdamW8bit:
    """Options of the optimizer `bnb.adamw_8bit`."""

    betas: tuple[float, float] = option((0.9, 0.999), help="Decays of the two moments.", low=0.0, high=0.9999999)
    eps: float = option(1e-8, help="Added to the root of the second moment.", low=0.0)
    weight_decay: float = option(0.01, help="Decoupled decay, times the learning rate.", low=0.0)


@attrs.frozen(kw_only=True)
class PagedAdamW8bit(AdamW8bit):
    """Options of the optimizer `bnb.paged_adamw_8bit`."""


@attrs.frozen(kw_only=True)
class Lion8bit:
    """Options of the optimizer `bnb.lion_8bit`."""

    betas: tuple[float, float] = option(
        (0.9, 0.99),
        help="Decay of the momentum in the step, and of the momentum that is kept.",
        low=0.0,
        high=0.9999999,
    )
    weight_decay: float = option(0.0, help="Decoupled decay, times the learning rate.", low=0.0)


@hookimpl
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    return [
        _quantizer("bnb.nf4", BnbNf4, 4, 0.15, "The base's linear weights in NF4 by bitsandbytes; nf4 is our own."),
        _quantizer("bnb.fp4", BnbFp4, 4, 0.2, "The base's linear weights in FP4 by bitsandbytes; fp4 is our own."),
        _quantizer("bnb.int8", BnbInt8, 8, 0.02, "The base's linear weights in int8, a scale for each row."),
    ]


@hookimpl
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    return [
        _optimizer("bnb.adamw_8bit", AdamW8bit, "bitsandbytes' AdamW with both moments in 8 bits."),
        _optimizer("bnb.lion_8bit", Lion8bit, "bitsandbytes' Lion with its moment in 8 bits."),
        _optimizer(
            "bnb.paged_adamw_8bit", PagedAdamW8bit, "bitsandbytes' 8-bit AdamW, paged from a GPU to host memory."
        ),
    ]


def _quantizer(name: str, options: type[Any], bits: int, tolerance: float, summary: str) -> QuantizerRecord:
    return QuantizerRecord(
        name=name,
        summary=summary,
        options=options,
        build="luthier_bitsandbytes.quantizer:BnbQuantizer",
        bits=bits,
        tolerance=tolerance,
        provides="quantized-base",
    )


def _optimizer(name: str, options: type[Any], summary: str) -> OptimizerRecord:
    build = "luthier_bitsandbytes.optimizers:BnbOptimizer"
    return OptimizerRecord(name=name, summary=summary, options=options, build=build)
