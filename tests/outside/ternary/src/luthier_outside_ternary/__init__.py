"""The quantizer `outside.ternary`: its options, its record and its hook."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from luthier import QuantizerRecord, hookimpl, option

__version__ = "0.1.0"


@attrs.frozen(kw_only=True)
class Ternary:
    """Options of the quantizer `outside.ternary`."""

    ramp: float = option(0.5, help="Share of the steps over which weights become ternary; 0: at once.", low=0, high=1)
    decay_until: float = option(0.5, help="Share of the steps after which weights no longer decay.", low=0, high=1)


@hookimpl
def luthier_quantizers() -> Iterable[QuantizerRecord]:
    return [
        QuantizerRecord(
            name="outside.ternary",
            summary="Linear weights trained to be -s, 0 or s (BitNet b1.58), step by step.",
            options=Ternary,
            build="luthier_outside_ternary.quantizer:TernaryQuantizer",
            bits=1.58,
            tolerance=0.6,
            trains=True,
            provides="dense-weights",
        )
    ]
