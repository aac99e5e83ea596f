"""What luthier-objectives offers: shaped supervised losses and unlearning, described without importing torch."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import LossRecord, LuthierError, PenaltyRecord, hookimpl, option

__all__ = [
    "AnchoredSft",
    "L1",
    "L2",
    "L2Start",
    "Kl",
    "Negated",
    "Npo",
    "ShapedSft",
    "TernaryDistance",
    "luthier_losses",
    "luthier_penalties",
]


@attrs.frozen(kw_only=True)
class ShapedSft:
    """Options of `shaped_sft`."""

    label_smoothing: float = option(
        0.0, help="Share of each label's probability that is spread evenly over all tokens.", low=0.0, high=0.99
    )
    z_loss: float = option(
        0.0, help="Weight of the squared logarithm of the softmax's denominator.", low=0.0, high=10.0
    )
    dft: bool = option(False, help="Weight each token by the probability that the model gives it (DFT).")

    def __attrs_post_init__(self) -> None:
        if self.dft and self.label_smoothing:
            problem = "dft weights a token by the probability of its label, and smoothing has no single label"
            where, remedy = f"{type(self).__name__}.label_smoothing", "Leave it at 0, or dft off."
            raise LuthierError("recipe-conflict", problem, where=where, found=self.label_smoothing, remedy=remedy)


@attrs.frozen(kw_only=True)
class AnchoredSft(ShapedSft):
    """Options of `anchored_sft`."""

    kl_weight: float = option(
        0.1, help="Weight of KL(model || reference) at each supervised token.", low=1e-6, high=1e3
    )


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
    return [*_supervised(), *_unlearning()]


def _supervised() -> list[LossRecord]:
    return [
        LossRecord(
            name="shaped_sft",
            summary="Supervised fine-tuning with label smoothing, z-loss or tokens weighted by their probability.",
            options=ShapedSft,
            build="luthier_objectives.supervised:ShapedLoss",
        ),
        LossRecord(
            name="anchored_sft",
            summary="The loss shaped_sft plus a divergence from the reference.",
            options=AnchoredSft,
            build="luthier_objectives.supervised:AnchoredLoss",
            needs="reference",
        ),
    ]


def _unlearning() -> list[LossRecord]:
    return [
        LossRecord(
            name="npo",
            summary="Unlearning by negative preference: rows with `forget: true` less likely than under the reference.",
            options=Npo,
            build="luthier_objectives.unlearning:NpoLoss",
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
