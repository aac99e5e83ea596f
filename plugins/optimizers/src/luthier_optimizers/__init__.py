"""What luthier-optimizers offers, described without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from luthier import OptimizerRecord, hookimpl

from luthier_optimizers.options import Adafactor, AdamW8bit, AdEMAMix, Apollo, Muon, PagedAdamW, ScheduleFree

__version__ = "0.1.0"
__all__ = [
    "AdEMAMix",
    "Adafactor",
    "AdamW8bit",
    "Apollo",
    "Muon",
    "PagedAdamW",
    "ScheduleFree",
    "luthier_optimizers",
    "state_bytes",
]


@hookimpl
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    listed = (
        ("adamw_8bit", AdamW8bit, "EightBitAdamW", "AdamW with both moments in 8 bits: 2.03 bytes a weight, not 8."),
        ("muon", Muon, "MuonPart", "Orthogonalized momentum for matrices, AdamW for the rest: 4 bytes a weight."),
        ("adafactor", Adafactor, "AdafactorPart", "Second moments as a row and a column: hardly any bytes a weight."),
        ("schedule_free", ScheduleFree, "ScheduleFreePart", "AdamW whose average is evaluated and saved: 8 bytes."),
        ("ademamix", AdEMAMix, "AdEMAMixPart", "AdamW with a second, slow momentum: 12 bytes a weight."),
        (
            "apollo",
            Apollo,
            "ApolloPart",
            "AdamW's step sizes from a random projection: 8 bytes a weight times rank / width.",
        ),
        ("paged_adamw", PagedAdamW, "PagedAdamWPart", "AdamW whose moments lie in a file that memory is mapped to."),
    )
    return [
        OptimizerRecord(name=name, summary=summary, options=options, build=f"luthier_optimizers.parts:{part}")
        for name, options, part, summary in listed
    ]


def state_bytes(optimizer: Any) -> float:
    """Return how many bytes an optimizer that has stepped keeps for each parameter."""
    from luthier_optimizers.stepper import state_bytes as measured

    return measured(optimizer)
