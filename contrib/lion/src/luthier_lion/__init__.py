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
        help="Share of the momentum that enters the step, and share of it that is kept for the next step.",
        low=0.0,
        high=0.9999,
    )
    weight_decay: float = option(
        0.0, help="Decoupled weight decay; 3 to 10 times AdamW's has the same effect.", low=0.0
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
