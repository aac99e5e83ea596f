"""What luthier-contrastive offers: InfoNCE with and without hard negatives, described without importing torch."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import LossRecord, hookimpl, option

__all__ = ["Infonce", "InfonceHard", "luthier_losses"]


@attrs.frozen(kw_only=True)
class Infonce:
    """Options of `infonce`."""

    temperature: float = option(0.05, help="Divides the cosine of a query and a passage.", low=0.001, high=10.0)
    pooling: Literal["mean", "last"] = option(
        "mean",
        help="The embedding of a text: the mean of its tokens' last hidden states, or the state of its last token.",
    )
    symmetric: bool = option(False, help="Each passage must find its query too; both costs count half.")


@attrs.frozen(kw_only=True)
class InfonceHard(Infonce):
    """Options of `infonce_hard`."""


@hookimpl
def luthier_losses() -> list[LossRecord]:
    pair = {"query": "query", "passage": "passage"}
    return [
        LossRecord(
            name="infonce",
            summary="InfoNCE: each query finds its passage among those of the whole global batch.",
            options=Infonce,
            build="luthier_contrastive.loss:InfonceLoss",
            data="documents",
            documents=pair,
            least_batch=2,  # the other passages are those of other rows
        ),
        LossRecord(
            name="infonce_hard",
            summary="InfoNCE with hard negatives: each query finds its passage among all passages and `negative` "
            "texts.",
            options=InfonceHard,
            build="luthier_contrastive.loss:InfonceLoss",
            data="documents",
            documents={**pair, "negative": "negative"},
        ),
    ]
