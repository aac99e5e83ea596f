"""What luthier-outside-kto offers: the loss `outside.kto`."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from luthier import LossRecord, hookimpl, option


@attrs.frozen(kw_only=True)
class Kto:
    """Options of `outside.kto`."""

    beta: float = option(0.1, help="How steeply an answer's value changes with its log ratio.", low=1e-3, high=10.0)
    desirable_weight: float = option(1.0, help="Weight of answers judged good.", low=0.01, high=100.0)
    undesirable_weight: float = option(1.0, help="Weight of answers judged bad.", low=0.01, high=100.0)


@hookimpl
def luthier_losses() -> Sequence[LossRecord]:
    """Return the loss."""
    return [
        LossRecord(
            name="outside.kto",
            summary="KTO: judged answers against the reference and the batch's mismatched pairs.",
            options=Kto,
            build="luthier_outside_kto.loss:KtoLoss",
            data="unpaired",
            needs="reference",
        )
    ]
