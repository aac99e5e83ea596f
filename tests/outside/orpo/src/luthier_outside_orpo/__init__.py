"""What luthier-outside-orpo offers: the loss `outside.orpo`."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from luthier import LossRecord, hookimpl, option


@attrs.frozen(kw_only=True)
class Orpo:
    """Options of `outside.orpo`."""

    beta: float = option(0.1, help="Weight of the odds ratio beside the likelihood.", low=1e-3, high=10.0)


@hookimpl
def luthier_losses() -> Sequence[LossRecord]:
    """Return the loss."""
    return [
        LossRecord(
            name="outside.orpo",
            summary="ORPO: the chosen answer's likelihood and the odds ratio of both answers.",
            options=Orpo,
            build="luthier_outside_orpo.loss:OrpoLoss",
            reference="luthier_outside_orpo.loss:plain_sums",
            data="preference",
        )
    ]
