"""The Lion optimizer as a Luthier plugin: its options, its record and its hook."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from luthier import OptimizerRecord, hookimpl, option

__version__ = "0.1.0"


@attrs.frozen(kw_only=True)
class Lion:
    """Options of the optimizer `lion`."""

    betas: tuple[float, float] = option(
        (0.9, 0.99),
        help="How much of the momentum enters the step, and how much of it is kept for the next one.",
        low=0.0,
        high=0.9999,
    )
    weight_decay: float = option(
        0.0, help="Decoupled weight decay; for the same effect as AdamW's take it 3 to 10 times as large.", low=0.0
    )


@hookimpl
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    return [
        OptimizerRecord(
            name="lion",
            summary="Lion: the sign of an interpolated momentum, one state tensor per weight (arXiv 2302.06675).",
            options=Lion,
            build="luthier_lion.optimizer:LionPart",
        )
    ]
