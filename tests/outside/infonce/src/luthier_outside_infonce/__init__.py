"""What luthier-outside-infonce offers: the loss `outside.infonce`."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from luthier import LossRecord, hookimpl, option


@attrs.frozen(kw_only=True)
class Infonce:
    """Options of `outside.infonce`."""

    temperature: float = option(0.05, help="Divides the cosine of a query and a passage.", low=0.01, high=10.0)


@hookimpl
def luthier_losses() -> Sequence[LossRecord]:
    """Return the loss."""
    return [
        LossRecord(
            name="outside.infonce",
            summary="InfoNCE: each query finds its passage among those of the batch.",
            options=Infonce,
            build="luthier_outside_infonce.loss:InfonceLoss",
            data="documents",
            documents={"query": "query", "passage": "passage"},
        )
    ]
