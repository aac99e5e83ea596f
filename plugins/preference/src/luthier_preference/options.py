"""Options of the preference losses: one frozen class per loss, which refuses what would have no effect."""

from __future__ import annotations

from typing import Final, Literal, get_args

import attrs
from luthier import LuthierError, option

LossType = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
SMOOTHED: Final = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")  # loss types that label_smoothing changes
DIVERGING: Final = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop")  # f_divergence_type
SORTING: Final = ("aot", "aot_unpaired")  # loss types that compare sorted values of the whole global batch
ALPHA: Final = 0.5
TAU: Final = 0.05


@attrs.frozen(kw_only=True)
class Dpo:
    """Options of `dpo`."""

    loss_type: LossType | list[LossType] = option(
        "sigmoid", help="The loss of the log ratios to the reference, under TRL's names; several are added."
    )
    loss_weights: list[float] | None = option(
        None, help="Weight of each loss type of a list; none: 1 each.", low=1e-6, high=1e6
    )
    beta: float = option(0.1, help="How strongly the policy is kept near the reference.", low=1e-3, high=100.0)
    label_smoothing: float = option(
        0.0, help=f"Share of pairs assumed to be labelled wrongly; for {', '.join(SMOOTHED)}.", low=0.0, high=1.0
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = option(
        "reverse_kl", help=f"The divergence that keeps the policy near the reference; for {', '.join(DIVERGING)}."
    )
    f_alpha_divergence_coef: float = option(
        ALPHA, help="Alpha of alpha_divergence; 1 is reverse_kl.", low=-10.0, high=10.0
    )
    ld_alpha: float | None = option(
        None, help="Weight of an answer's tokens beyond the length of the shorter one; none: 1.", low=0.0, high=1.0
    )
    discopop_tau: float = option(TAU, help="Temperature of discopop's mixing.", low=1e-3, high=100.0)

    @property
    def mixture(self) -> dict[str, float]:
        """The weight of each loss type."""
        types = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        return dict(zip(types, self.loss_weights or [1.0] * len(types), strict=True))

    def __attrs_post_init__(self) -> None:
        _check_mixture(self)
        types = tuple(self.mixture)
        _check_smoothing(self.label_smoothing, "Dpo.label_smoothing")
        _check_used(self.label_smoothing != 0, SMOOTHED, types, "Dpo.label_smoothing", self.label_smoothing)
        diverges = self.f_divergence_type != "reverse_kl"
        _check_used(diverges, DIVERGING, types, "Dpo.f_divergence_type", self.f_divergence_type)
        _check_used(self.discopop_tau != TAU, ("discopop",), types, "Dpo.discopop_tau", self.discopop_tau)
        measured = tuple(name for name in get_args(LossType) if name != "sft")
        _check_used(self.ld_alpha is not None, measured, types, "Dpo.ld_alpha", self.ld_alpha)
        if self.f_alpha_divergence_coef != ALPHA and self.f_divergence_type != "alpha_divergence":
            problem, remedy = "only alpha_divergence has it", "Leave it out, or choose that f_divergence_type."
            where, coefficient = "Dpo.f_alpha_divergence_coef", self.f_alpha_divergence_coef
            raise LuthierError("recipe-conflict", problem, where=where, found=coefficient, remedy=remedy)
        if not self.label_smoothing and "exo_pair" in types:
            problem = "exo_pair takes the logarithm of label_smoothing, which must be above 0"
            remedy, where = "Set it above 0; the paper recommends 0.001.", "Dpo.label_smoothing"
            raise LuthierError("recipe-conflict", problem, where=where, found=self.label_smoothing, remedy=remedy)


@attrs.frozen(kw_only=True)
class Reward:
    """Options of `reward`."""

    token: int = option(0, help="The token whose logit after an answer's last token is the answer's reward.", low=0)
    center_rewards_coefficient: float = option(
        0.0, help="Weight of the squared sum of a pair's rewards, which keeps them around 0.", low=0.0, high=100.0
    )


@attrs.frozen(kw_only=True)
class RewardMargin(Reward):
    """Options of `reward_margin`."""


@attrs.frozen(kw_only=True)
class Orpo:
    """Options of `orpo`."""

    beta: float = option(0.1, help="Weight of the odds ratio relative to the likelihood.", low=1e-3, high=100.0)
    nll_scope: Literal["completion", "full"] = option(
        "completion",
        help="The tokens whose likelihood is raised: the chosen answer's, or (as in TRL) also its prompt's.",
    )


@attrs.frozen(kw_only=True)
class Simpo:
    """Options of `simpo`."""

    beta: float = option(2.0, help="Scale of the difference of rewards.", low=1e-3, high=100.0)
    gamma: float = option(0.5, help="Margin that the scaled difference should exceed.", low=0.0, high=100.0)
    label_smoothing: float = option(0.0, help="Share of pairs assumed to be labelled wrongly.", low=0.0, high=1.0)
    alpha: float = option(
        0.0, help="Shape of the reward (1 - p^-alpha) / alpha of a mean probability p; 0: log p.", low=-10.0, high=10.0
    )
    cpo_alpha: float = option(
        0.0, help="Weight of the chosen answer's likelihood (CPO-SimPO); 0: none.", low=0.0, high=100.0
    )

    def __attrs_post_init__(self) -> None:
        _check_smoothing(self.label_smoothing, "Simpo.label_smoothing")


@attrs.frozen(kw_only=True)
class Cpo:
    """Options of `cpo`."""

    loss_type: Literal["sigmoid", "hinge", "ipo"] = option(
        "sigmoid", help="The loss of the log-probabilities; ipo takes means over tokens, the others sums."
    )
    beta: float = option(0.1, help="Scale of the difference of log-probabilities.", low=1e-3, high=100.0)
    cpo_alpha: float = option(1.0, help="Weight of the chosen answer's likelihood; 0: none.", low=0.0, high=100.0)
    label_smoothing: float = option(
        0.0, help="Share of pairs assumed to be labelled wrongly; for sigmoid.", low=0.0, high=1.0
    )

    def __attrs_post_init__(self) -> None:
        _check_smoothing(self.label_smoothing, "Cpo.label_smoothing")
        used = self.label_smoothing != 0
        _check_used(used, ("sigmoid",), (self.loss_type,), "Cpo.label_smoothing", self.label_smoothing)


@attrs.frozen(kw_only=True)
class Kto:
    """Options of `kto`."""

    beta: float = option(0.1, help="How steeply an answer's value changes with its log ratio.", low=1e-3, high=100.0)
    desirable_weight: float = option(1.0, help="Weight of answers judged good.", low=0.01, high=100.0)
    undesirable_weight: float = option(1.0, help="Weight of answers judged bad.", low=0.01, high=100.0)


@attrs.frozen(kw_only=True)
class ApoZeroUnpaired:
    """Options of `apo_zero_unpaired`."""

    beta: float = option(0.1, help="How steeply an answer's cost changes with its log ratio.", low=1e-3, high=100.0)
    desirable_weight: float = option(1.0, help="Weight of answers judged good.", low=0.01, high=100.0)
    undesirable_weight: float = option(1.0, help="Weight of answers judged bad.", low=0.01, high=100.0)


def _check_mixture(options: Dpo) -> None:
    """Raise `recipe-conflict` if types and weights do not fit together."""
    types, weights = options.loss_type, options.loss_weights
    if isinstance(types, str):
        if weights is not None:
            problem, remedy = "a single loss type has no weights", "Leave them out, or give loss_type as a list."
            raise LuthierError("recipe-conflict", problem, where="Dpo.loss_weights", found=weights, remedy=remedy)
        return
    if not types or len(set(types)) < len(types):
        problem, remedy = "the list names no loss type, or one twice", "Name each loss type once."
        raise LuthierError("recipe-conflict", problem, where="Dpo.loss_type", found=types, remedy=remedy)
    if weights is not None and len(weights) != len(types):
        problem, remedy = f"there are {len(types)} loss types", "Give one weight for each."
        raise LuthierError("recipe-conflict", problem, where="Dpo.loss_weights", found=weights, remedy=remedy)


def _check_used(given: bool, takers: tuple[str, ...], types: tuple[str, ...], where: str, value: object) -> None:
    """Raise `recipe-conflict` for an option that none of the loss types reads."""
    if given and not set(takers) & set(types):
        subject = f"the loss type {types[0]} ignores" if len(types) == 1 else f"{', '.join(types)} ignore"
        problem, remedy = f"{subject} it", f"Leave it out, or choose {', '.join(takers)}."
        raise LuthierError("recipe-conflict", problem, where=where, found=value, remedy=remedy)


def _check_smoothing(share: float, where: str) -> None:
    """Raise `recipe-conflict` if the smoothing leaves no preference to learn."""
    if share >= 0.5:
        problem = "at least half of the pairs would count as labelled wrongly, which leaves nothing to learn"
        raise LuthierError("recipe-conflict", problem, where=where, found=share, remedy="Set it below 0.5.")
