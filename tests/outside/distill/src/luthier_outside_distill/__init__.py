"""What luthier-outside-distill offers: the loss `outside.distill`."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from luthier import LossRecord, hookimpl, option


@attrs.frozen(kw_only=True)
class Distill:
    """Options of `outside.distill`."""

    temperature: float = option(1.0, help="What both models' logits are divided by.", low=0.1, high=100.0)


@hookimpl
def luthier_losses() -> Sequence[LossRecord]:
    """Return the loss."""
    return [
        LossRecord(
            name="outside.distill",
            summary="Distillation: the divergence from a teacher's distribution of every supervised token.",
            options=Distill,
            build="luthier_outside_distill.loss:DistillLoss",
            reference="luthier_outside_distill.loss:plain_sums",
            needs=("teacher",),
        )
    ]
