"""What luthier-optimizers offers: `adamw_8bit`, described without importing torch."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from luthier import OptimizerRecord, hookimpl, option

__version__ = "0.1.0"
__all__ = ["AdamW8bit", "luthier_optimizers"]


@attrs.frozen(kw_only=True)
class AdamW8bit:
    """Options of the optimizer `adamw_8bit`."""

    betas: tuple[float, float] = option((0.9, 0.999), help="Decay of the two moments.", low=0.0, high=0.9999)
    eps: float = option(1e-8, help="Added to the denominator.", low=0.0)
    weight_decay: float = option(0.0, help="Decoupled weight decay.", low=0.0)


@hookimpl
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    return [
        OptimizerRecord(
            name="adamw_8bit",
            summary="AdamW with both moments in 8 bits: 2.03 bytes a weight in place of 8.",
            options=AdamW8bit,
            build="luthier_optimizers.parts:EightBitAdamW",
        ),
    ]
