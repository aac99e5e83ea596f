"""What luthier-osft offers: the adapter `osft`, described without importing torch."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import AdapterRecord, LuthierError, hookimpl, option

__all__ = ["Osft", "luthier_adapters"]

DEFAULT_RATIO = 0.25
DEFAULT_MINIMUM = 0.1  # the paper's mrr
DEFAULT_BATCHES = 8


@attrs.frozen(kw_only=True)
class Osft:
    """`adapter: {name: osft, unfreeze_rank_ratio: 0.25, ...}`"""

    unfreeze_rank_ratio: float | None = option(
        None,
        help="Share of each target's singular directions that trains, beginning with the smallest; 0 freezes "
        "everything, 1 is "
        "full training; none: 0.25, or the share of rank_rule `schedule`.",
        low=0.0,
        high=1.0,
    )
    form: Literal["core", "factored"] = option(
        "core", help="`core`: train C in W0 + Q_U C Q_V^T; `factored`: train the smallest singular triplets."
    )
    target_patterns: list[str] | None = option(
        None, help="Linear layers, by patterns in their names; none: all except the head and routers."
    )
    match: Literal["substring", "regex"] = option("substring", help="How a pattern matches the name of a layer.")
    rank_rule: Literal["fixed", "importance", "schedule"] = option(
        "fixed",
        help="`fixed`: the same ratio for every layer; `importance`: preserve more in layers whose output is like "
        "their input; "
        "`schedule`: task i of n preserves (i-1)/n.",
    )
    min_preserved_ratio: float | None = option(
        None, help="Smallest share that `importance` preserves; none: 0.1.", low=0.0, high=1.0
    )
    calibration_batches: int | None = option(
        None, help="Packed batches of training data for `importance`; none: 8.", low=1
    )
    train_non_targets: bool = option(
        False, help="Also train everything else (embeddings, norms, biases, head), which nothing protects."
    )

    def __attrs_post_init__(self) -> None:
        if self.rank_rule == "schedule":
            self._refuse("unfreeze_rank_ratio", "rank_rule `schedule` decides how much trains")
            if self.form == "factored":
                problem = (
                    "rank_rule `schedule` changes the number of directions in each task, but factors have a fixed size"
                )
                raise LuthierError("recipe-conflict", problem, where="form", remedy="Choose form: core.")
        if self.rank_rule != "importance":
            for name in ("min_preserved_ratio", "calibration_batches"):
                self._refuse(name, "only rank_rule `importance` reads it")
        elif self.minimum > 1 - self.ratio:
            problem = f"it is above {1 - self.ratio:g}, the share that unfreeze_rank_ratio preserves"
            raise LuthierError("recipe-conflict", problem, where="min_preserved_ratio", found=self.minimum,
                               remedy="Lower one of them.")  # fmt: skip

    def _refuse(self, name: str, problem: str) -> None:
        value = getattr(self, name)
        if value is not None:
            raise LuthierError("recipe-conflict", problem, where=name, found=value, remedy="Leave it out.")

    @property
    def ratio(self) -> float:
        """The share of directions that trains, unless the rule decides it."""
        return DEFAULT_RATIO if self.unfreeze_rank_ratio is None else self.unfreeze_rank_ratio

    @property
    def minimum(self) -> float:
        """The smallest share that `importance` preserves."""
        return min(DEFAULT_MINIMUM, 1 - self.ratio) if self.min_preserved_ratio is None else self.min_preserved_ratio

    @property
    def num_batches(self) -> int:
        """The number of batches on which importance is measured."""
        return DEFAULT_BATCHES if self.calibration_batches is None else self.calibration_batches


@hookimpl
def luthier_adapters() -> list[AdapterRecord]:
    return [
        AdapterRecord(
            name="osft",
            summary="Orthogonal subspace fine-tuning: the main singular directions of every weight are preserved.",
            options=Osft,
            build="luthier_osft.adapter:OsftAdapter",
            provides=("trainable-weights",),
        )
    ]
