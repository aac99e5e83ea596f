"""What luthier-preference offers: losses on pairs and judged answers, described without importing torch."""

from __future__ import annotations

from luthier import LossRecord, hookimpl

from luthier_preference.options import ApoZeroUnpaired, Cpo, Dpo, Kto, Orpo, Reward, RewardMargin, Simpo

__all__ = ["ApoZeroUnpaired", "Cpo", "Dpo", "Kto", "Orpo", "Reward", "RewardMargin", "Simpo", "luthier_losses"]


@hookimpl
def luthier_losses() -> list[LossRecord]:
    return [_dpo(), *_without_reference(), *_judged(), *_rewards()]


def _dpo() -> LossRecord:
    return LossRecord(
        name="dpo",
        summary="DPO and related losses on the log ratios of pairs to the reference.",
        options=Dpo,
        build="luthier_preference.dpo:DpoLoss",
        data="preference",
        dropout=False,
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
            dropout=False,
        ),
        LossRecord(
            name="simpo",
            summary="SimPO: the mean log-probabilities of both answers differ by a margin, without a reference.",
            options=Simpo,
            build="luthier_preference.cpo:SimpoLoss",
            data="preference",
            dropout=False,
        ),
        LossRecord(
            name="cpo",
            summary="CPO: the difference of log-probabilities and the chosen answer's likelihood, without a reference.",
            options=Cpo,
            build="luthier_preference.cpo:CpoLoss",
            data="preference",
            dropout=False,
        ),
    ]


def _judged() -> list[LossRecord]:
    return [
        LossRecord(
            name="kto",
            summary="KTO: judged answers compared with the reference and the batch's mismatched pairs.",
            options=Kto,
            build="luthier_preference.kto:KtoLoss",
            data="unpaired",
            dropout=False,
            needs="reference",
            least_batch=2,  # with one row the mismatched pair is the row itself
        ),
        LossRecord(
            name="apo_zero_unpaired",
            summary="APO-zero on judged answers: good ones likelier than under the reference, bad ones less likely.",
            options=ApoZeroUnpaired,
            build="luthier_preference.kto:ApoZeroUnpairedLoss",
            data="unpaired",
            dropout=False,
            needs="reference",
        ),
    ]


def _rewards() -> list[LossRecord]:
    """Return both reward losses. Margins need a record of their own, because its columns are fixed."""
    return [
        LossRecord(
            name="reward",
            summary="Reward modelling (Bradley-Terry): the chosen answer's reward above the rejected one's.",
            options=Reward,
            build="luthier_preference.reward:RewardLoss",
            data="preference",
            dropout=False,
        ),
        LossRecord(
            name="reward_margin",
            summary="Reward modelling with margins: the chosen answer's reward is higher by the row's `margin`.",
            options=RewardMargin,
            build="luthier_preference.reward:RewardLoss",
            data="preference",
            dropout=False,
            columns={"margin": "float"},
        ),
    ]
