"""What luthier-nf4 offers: the quantizers `nf4` and `fp4`, described without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
from luthier import QuantizerRecord, hookimpl, option

__version__ = "0.1.0"
__all__ = ["Fp4", "Nf4", "luthier_quantizers", "save_quantized"]


@attrs.frozen(kw_only=True)
class Nf4:
    """Options of the quantizer `nf4`."""

    block_size: int = option(
        64,
        help="Number of weights that share a scale. Smaller is more exact.",
        choices=(32, 64, 128, 256, 512, 1024, 2048, 4096),
    )
    use_double_quant: bool = option(True, help="Store the scales in 8 bits: 4.13 bits a weight instead of 4.5.")
    skip_modules: list[str] = option(
        factory=list,
        help="Modules that stay exact, besides the output head, with all their parts: names, or whole parts of names.",
    )


@attrs.frozen(kw_only=True)
class Fp4(Nf4):
    """Options of the quantizer `fp4`."""


@hookimpl
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    build = "luthier_nf4.quantizer:FourBitQuantizer"
    return [
        QuantizerRecord(
            name="nf4",
            summary="The base model's linear weights in 4 bits, at quantiles of a normal distribution (QLoRA).",
            options=Nf4,
            build=build,
            bits=4,
            tolerance=0.15,
            provides="quantized-base",
        ),
        QuantizerRecord(
            name="fp4",
            summary="The base model's linear weights in 4-bit floating point; nf4 is more exact.",
            options=Fp4,
            build=build,
            bits=4,
            tolerance=0.2,
            provides="quantized-base",
        ),
    ]


def save_quantized(model: Any, folder: str | Path) -> None:
    """Write a 4-bit model so that transformers loads it with bitsandbytes. Merge an adapter before."""
    from luthier_nf4.files import write_model

    write_model(model, Path(folder))
