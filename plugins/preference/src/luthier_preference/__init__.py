"""What luthier-preference offers: losses on pairs and judged answers, described without importing torch."""

from __future__ import annotations

from typing import Final, Literal

import attrs
from luthier import LossRecord, LuthierError, hookimpl, option

__all__ = ["Cpo", "Dpo", "Kto", "Orpo", "Simpo", "luthier_losses"]

SMOOTHED: Final = ("sigmoid", "robust", "exo_pair")  # what label_smoothing changes, of DPO's loss types


@attrs.frozen(kw_only=True)
class Dpo:
    """Options of `dpo`."""

    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
        "sigmoid_norm",
    ] = option("sigmoid", help="What is minimised of the log ratios to the reference, under TRL's names.")  # fmt: skip
    beta: float = option(0.1, help="How strongly the policy is held to the reference.", low=1e-3, high=100.0)
    label_smoothing: float = option(
        0.0, help="Share of pairs taken to be the wrong way round; of sigmoid, robust and exo_pair.", low=0.0, high=1.0
    )

    def __attrs_post_init__(self) -> None:
        where = "Dpo.label_smoothing"
        _check_smoothing(self.label_smoothing, where)
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            problem = f"the loss type {self.loss_type} has no label smoothing"
            remedy = f"Leave it at 0, or choose {', '.join(SMOOTHED)}."
            raise LuthierError("recipe-conflict", problem, where=where, found=self.label_smoothing, remedy=remedy)
        if not self.label_smoothing and self.loss_type == "exo_pair":
            problem = "exo_pair takes the logarithm of label_smoothing, which must be above 0"
            remedy = "Set it above 0; the paper recommends 0.001."
            raise LuthierError("recipe-conflict", problem, where=where, found=self.label_smoothing, remedy=remedy)


@attrs.frozen(kw_only=True)
class Orpo:
    """Options of `orpo`."""

    beta: float = option(0.1, help="Weight of the odds ratio beside the likelihood.", low=1e-3, high=100.0)
    nll_scope: Literal["completion", "full"] = option(
        "completion", help="Whose likelihood is raised: the chosen answer's, or (as in TRL) that of its prompt too."
    )


@attrs.frozen(kw_only=True)
class Simpo:
    """Options of `simpo`."""

    beta: float = option(2.0, help="Scale of the difference of mean log-probabilities.", low=1e-3, high=100.0)
    gamma: float = option(0.5, help="The margin that the scaled difference is to exceed.", low=0.0, high=100.0)
    label_smoothing: float = option(0.0, help="Share of pairs taken to be the wrong way round.", low=0.0, high=1.0)

    def __attrs_post_init__(self) -> None:
        _check_smoothing(self.label_smoothing, "Simpo.label_smoothing")


@attrs.frozen(kw_only=True)
class Cpo:
    """Options of `cpo`."""

    loss_type: Literal["sigmoid", "hinge", "ipo"] = option(
        "sigmoid", help="What is minimised of the log-probabilities; ipo takes means over tokens, the others sums."
    )
    beta: float = option(0.1, help="Scale of the difference of log-probabilities.", low=1e-3, high=100.0)
    cpo_alpha: float = option(1.0, help="Weight of the chosen answer's likelihood; 0: none.", low=0.0, high=100.0)
    label_smoothing: float = option(
        0.0, help="Share of pairs taken to be the wrong way round; of sigmoid.", low=0.0, high=1.0
    )

    def __attrs_post_init__(self) -> None:
        where = "Cpo.label_smoothing"
        _check_smoothing(self.label_smoothing, where)
        if self.label_smoothing and self.loss_type != "sigmoid":
            problem = f"the loss type {self.loss_type} has no label smoothing"
            remedy = "Leave it at 0, or choose sigmoid."
            raise LuthierError("recipe-conflict", problem, where=where, found=self.label_smoothing, remedy=remedy)


@attrs.frozen(kw_only=True)
class Kto:
    """Options of `kto`."""

    beta: float = option(0.1, help="How steeply an answer's value changes with its log ratio.", low=1e-3, high=100.0)
    desirable_weight: float = option(1.0, help="Weight of answers judged good.", low=0.01, high=100.0)
    undesirable_weight: float = option(1.0, help="Weight of answers judged bad.", low=0.01, high=100.0)


def _check_smoothing(share: float, where: str) -> None:
    """Raise `recipe-conflict` where the smoothing leaves no preference to learn."""
    if share >= 0.5:
        problem = "at least half of the pairs would count as the wrong way round, which leaves nothing to learn"
        raise LuthierError("recipe-conflict", problem, where=where, found=share, remedy="Set it below 0.5.")


@hookimpl
def luthier_losses() -> list[LossRecord]:
    return [_dpo(), *_without_reference(), _kto()]


def _dpo() -> LossRecord:
    return LossRecord(
        name="dpo",
        summary="DPO and its relatives: each pair's log ratios to the reference.",
        options=Dpo,
        build="luthier_preference.dpo:DpoLoss",
        data="preference",
        needs="reference",
    )


def _without_reference() -> list[LossRecord]:
    return [
        LossRecord(
            name="orpo",
            summary="ORPO: the chosen answer's likelihood and the odds ratio of both, without a reference.",
            options=Orpo,
            build="luthier_preference.orpo:OrpoLoss",
            data="preference",
        ),
        LossRecord(
            name="simpo",
            summary="SimPO: mean log-probabilities apart by a margin, without a reference.",
            options=Simpo,
            build="luthier_preference.cpo:SimpoLoss",
            data="preference",
        ),
        LossRecord(
            name="cpo",
            summary="CPO: the difference of log-probabilities and the chosen answer's likelihood, without a reference.",
            options=Cpo,
            build="luthier_preference.cpo:CpoLoss",
            data="preference",
        ),
    ]


def _kto() -> LossRecord:
    return LossRecord(
        name="kto",
        summary="KTO: judged answers against the reference and the batch's mismatched pairs.",
        options=Kto,
        build="luthier_preference.kto:KtoLoss",
        data="unpaired",
        needs="reference",
    )
