"""Weight-only int8 quantization as a Luthier plugin: its options, its record and its hook."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from luthier import QuantizerRecord, hookimpl, option

__version__ = "0.1.0"


@attrs.frozen(kw_only=True)
class Int8:
    """Options of the quantizer `int8`."""

    group_size: int | None = option(
        None, help="Number of weights of a row that share a scale; none: the whole row. Smaller is more exact.", low=1
    )
    skip_modules: list[str] = option(
        factory=list,
        help="Modules that stay exact, besides the output head, with all their parts: names, or whole parts of names.",
    )


@hookimpl
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    return [
        QuantizerRecord(
            name="int8",
            summary="The base model's linear weights in 8 bits, with a float32 scale for each row or group.",
            options=Int8,
            build="luthier_int8.quantizer:Int8Quantizer",
            bits=8,
            tolerance=0.02,
            provides="quantized-base",
        )
    ]
