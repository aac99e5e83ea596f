"""What luthier-outside-dpo offers: the loss `outside.dpo`."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from luthier import LossRecord, hookimpl, option


@attrs.frozen(kw_only=True)
class Dpo:
    """Options of `outside.dpo`."""

    beta: float = option(0.1, help="How strongly the policy is held to the reference.", low=1e-3, high=10.0)


@hookimpl
def luthier_losses() -> Sequence[LossRecord]:
    """Return the loss."""
    return [
        LossRecord(
            name="outside.dpo",
            summary="DPO: the chosen answer's log-ratio to the reference above the rejected one's.",
            options=Dpo,
            build="luthier_outside_dpo.loss:DpoLoss",
            reference="luthier_outside_dpo.loss:plain_sums",
            data="preference",
            needs=("reference",),
        )
    ]
