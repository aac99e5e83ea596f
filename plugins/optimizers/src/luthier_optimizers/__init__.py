"""What luthier-optimizers offers, described without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from luthier import OptimizerRecord, hookimpl

from luthier_optimizers.options import (
    Adafactor,
    AdamW8bit,
    AdEMAMix,
    Apollo,
    Auto,
    Evolution,
    Muon,
    PagedAdamW,
    ScheduleFree,
)

__version__ = "0.1.0"
__all__ = [
    "AdEMAMix",
    "Adafactor",
    "AdamW8bit",
    "Apollo",
    "Auto",
    "Evolution",
    "Muon",
    "PagedAdamW",
    "ScheduleFree",
    "luthier_optimizers",
    "state_bytes",
]


@hookimpl
def luthier_optimizers() -> Iterable[OptimizerRecord]:
    return [*_frugal_optimizers(), *_other_optimizers(), *_gradient_free_optimizers()]


def _frugal_optimizers() -> list[OptimizerRecord]:
    """Return the optimizers whose state is small, or not in memory."""
    return [
        OptimizerRecord(
            name="adamw_8bit",
            summary="AdamW with both moments in 8 bits: 2.03 bytes a weight instead of 8.",
            options=AdamW8bit,
            build="luthier_optimizers.parts:EightBitAdamW",
        ),
        OptimizerRecord(
            name="adafactor",
            summary="Adafactor: second moments as a row and a column, which take almost no memory.",
            options=Adafactor,
            build="luthier_optimizers.parts:AdafactorPart",
        ),
        OptimizerRecord(
            name="apollo",
            summary="APOLLO: AdamW's step sizes from a random projection: 8 bytes a weight times rank / width.",
            options=Apollo,
            build="luthier_optimizers.parts:ApolloPart",
        ),
        OptimizerRecord(
            name="paged_adamw",
            summary="AdamW with its moments in a memory-mapped file.",
            options=PagedAdamW,
            build="luthier_optimizers.parts:PagedAdamWPart",
        ),
    ]


def _other_optimizers() -> list[OptimizerRecord]:
    """Return the optimizers whose rule differs from AdamW's."""
    return [
        OptimizerRecord(
            name="auto",
            summary="AdamW with its moments exact, in 8 bits or in a file: by the device's memory.",
            options=Auto,
            build="luthier_optimizers.choosing:AutoPart",
        ),
        OptimizerRecord(
            name="muon",
            summary="Orthogonalized momentum for matrices, AdamW for the rest: 4 bytes a weight.",
            options=Muon,
            build="luthier_optimizers.parts:MuonPart",
        ),
        OptimizerRecord(
            name="schedule_free",
            summary="Schedule-free AdamW, whose average is evaluated and saved: 8 bytes a weight.",
            options=ScheduleFree,
            build="luthier_optimizers.parts:ScheduleFreePart",
        ),
        OptimizerRecord(
            name="ademamix",
            summary="AdEMAMix: AdamW with a second, slow momentum: 12 bytes a weight.",
            options=AdEMAMix,
            build="luthier_optimizers.parts:AdEMAMixPart",
        ),
    ]


def _gradient_free_optimizers() -> list[OptimizerRecord]:
    """Return the optimizers that run no backward."""
    return [
        OptimizerRecord(
            name="evolution",
            summary="Evolution strategies: AdamW on a gradient estimated by forward passes alone, without backward.",
            options=Evolution,
            build="luthier_optimizers.evolution:EvolutionPart",
            needs="closure",
        ),
    ]


def state_bytes(optimizer: Any) -> float:
    """Return the bytes of state per parameter of an optimizer that has stepped."""
    from luthier_optimizers.stepper import state_bytes as measured

    return measured(optimizer)
