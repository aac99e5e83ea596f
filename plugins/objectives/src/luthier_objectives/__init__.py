"""What luthier-objectives offers: penalties and unlearning, described without importing torch."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import LossRecord, PenaltyRecord, hookimpl, option

__all__ = [
    "L1",
    "L2",
    "L2Start",
    "Kl",
    "Negated",
    "Npo",
    "TernaryDistance",
    "luthier_losses",
    "luthier_penalties",
]


@attrs.frozen(kw_only=True)
class Npo:
    """Options of `npo`."""

    beta: float = option(
        0.1, help="How soon an answer counts as forgotten: a smaller beta means later.", low=1e-3, high=100.0
    )
    retain_weight: float = option(1.0, help="Weight of the likelihood of rows to keep.", low=0.0, high=1e3)


@attrs.frozen(kw_only=True)
class Negated:
    """Options of `negated`."""

    forget_weight: float = option(1.0, help="Weight of the negated likelihood of rows to forget.", low=1e-6, high=1e3)
    retain_weight: float = option(1.0, help="Weight of the likelihood of rows to keep.", low=0.0, high=1e3)


@attrs.frozen(kw_only=True)
class L2:
    """Options of `l2`."""

    weight: float = option(1e-4, help="Weight of the sum over all counted weights.", low=0.0, high=1e6)
    all_roles: bool = option(False, help="Include norms and biases.")


@attrs.frozen(kw_only=True)
class L1(L2):
    """Options of `l1`."""


@attrs.frozen(kw_only=True)
class L2Start(L2):
    """Options of `l2_start`."""


@attrs.frozen(kw_only=True)
class TernaryDistance(L2):
    """Options of `ternary_distance`."""


@attrs.frozen(kw_only=True)
class Kl:
    """Options of `kl`."""

    weight: float = option(0.1, help="Weight of the divergence at each supervised token.", low=1e-6, high=1e3)
    divergence: Literal["reverse_kl", "forward_kl"] = option(
        "reverse_kl", help="KL(model || reference), or forward_kl: KL(reference || model)."
    )


@hookimpl
def luthier_penalties() -> list[PenaltyRecord]:
    return [*_of_weights(), _of_tokens()]


def _of_tokens() -> PenaltyRecord:
    return PenaltyRecord(
        name="kl",
        summary="The divergence from the reference at each supervised token.",
        options=Kl,
        build="luthier_objectives.token_penalties:KlPenalty",
        needs="reference",
        over="tokens",
    )


def _of_weights() -> list[PenaltyRecord]:
    summaries = {
        "l1": ("The sum of absolute weights.", L1, "L1Penalty"),
        "l2": ("The sum of squared weights.", L2, "L2Penalty"),
        "l2_start": (
            "The sum of squared distances to the weights before the first step (L2-SP).",
            L2Start,
            "StartPenalty",
        ),
        "ternary_distance": ("The squared distance of weights to -s, 0 and s.", TernaryDistance, "TernaryPenalty"),
    }
    return [
        PenaltyRecord(name=name, summary=summary, options=options, build=f"luthier_objectives.penalties:{build}",
                      needs="trainable-weights")
        for name, (summary, options, build) in summaries.items()
    ]  # fmt: skip


@hookimpl
def luthier_losses() -> list[LossRecord]:
    return [
        LossRecord(
            name="npo",
            summary="Unlearning by negative preference: rows with `forget: true` less likely than under the reference.",
            options=Npo,
            build="luthier_objectives.unlearning:NpoLoss",
            dropout=False,
            columns={"forget": "bool"},
            needs="reference",
        ),
        LossRecord(
            name="negated",
            summary="Unlearning by gradient ascent: rows with `forget: true` become less likely, without bound.",
            options=Negated,
            build="luthier_objectives.unlearning:NegatedLoss",
            columns={"forget": "bool"},
        ),
    ]
