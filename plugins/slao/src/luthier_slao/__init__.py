"""What luthier-slao offers: the adapter `slao`, described without importing torch."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import AdapterRecord, hookimpl, option

__all__ = ["Slao", "luthier_adapters"]


@attrs.frozen(kw_only=True)
class Slao:
    """`adapter: {name: slao, r: 8, ...}`"""

    r: int = option(8, help="Rank of the update.", low=1)
    lora_alpha: int = option(16, help="The update is scaled by lora_alpha / r, the same in every task.", low=1)
    lora_dropout: float = option(0.0, help="Share of an update's inputs that training drops.", low=0.0, high=0.99)
    target_modules: str | list[str] | None = option(
        None, help="Linear layers, by ends of their names, or `all-linear`; none: q_proj and v_proj."
    )
    begin_from: Literal["last_trained", "last_merged", "zero"] = option(
        "last_trained", help="The B from which each later task begins; the paper uses the last trained B."
    )
    merge_weight: Literal["inverse_sqrt", "inverse", "replace"] = option(
        "inverse_sqrt", help="Weight of the B of task i in the merge: 1/sqrt(i), 1/i, or 1."
    )
    max_drift: float | None = option(
        None,
        help="Refuse a merge that would change B by more than this share of its norm; none: never refuse.",
        low=0.0,
    )
    max_loss_rise: float | None = option(
        None,
        help="Refuse a merge after which the task's held-out loss is higher than before the task by more than this; "
        "none: never refuse.",
        low=0.0,
    )


@hookimpl
def luthier_adapters() -> list[AdapterRecord]:
    return [
        AdapterRecord(
            name="slao",
            summary="One low-rank adapter for many tasks, merged after each (SLAO), in PEFT's files.",
            options=Slao,
            build="luthier_slao.adapter:SlaoAdapter",
            provides=("reference", "trainable-weights"),
        )
    ]
