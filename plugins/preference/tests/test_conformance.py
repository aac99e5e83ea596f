"""The conformance kit on each loss, with every loss type among the examples."""

from luthier.testing import conformance
from luthier_preference import ApoZeroUnpaired, Cpo, Dpo, Kto, Orpo, Reward, RewardMargin, Simpo, luthier_losses
from luthier_preference.formulas import FORMULAS
from luthier_preference.options import SMOOTHED, SORTING

UNSORTED = [name for name in FORMULAS if name not in SORTING]
BARE = [name for name in UNSORTED if name not in SMOOTHED]
CALM = [0.1 if name == "discopop" else 1.0 for name in BARE]  # which alone rises where both answers are alike
EVERY = [
    Dpo(loss_type=[name for name in UNSORTED if name in SMOOTHED], label_smoothing=0.1),
    Dpo(loss_type=[*BARE, "sft"], loss_weights=[*CALM, 0.5], ld_alpha=0.5),
    Dpo(f_divergence_type="forward_kl"),
    Dpo(loss_type=["hinge", "ipo"], f_divergence_type="alpha_divergence"),
    Dpo(loss_type="sft"),
    Dpo(beta=2.0, label_smoothing=0.2),
]
SORTED = Dpo(loss_type=[*SORTING, "discopop"], loss_weights=[1.0, 1.0, 0.1], label_smoothing=0.1)
RECORDS = {record.name: record for record in luthier_losses()}
AT_THE_END = "a reward is read after an answer's last token, where no label is predicted"


@conformance([RECORDS["dpo"]], examples=EVERY, vary=False)
def test_dpo_conforms(check):
    check()


@conformance([RECORDS["dpo"]], examples=[SORTED], vary=False)
def test_dpo_conforms_where_it_sorts(check):
    check()


@conformance(
    [RECORDS["reward"], RECORDS["reward_margin"]],
    {"ignores_unlabelled_tokens": AT_THE_END, "prefers_what_the_row_prefers": AT_THE_END},
    examples=[Reward(token=3), RewardMargin(center_rewards_coefficient=0.01)],
)
def test_reward_conforms(check):
    check()


@conformance([RECORDS["orpo"]], examples=[Orpo(nll_scope="full"), Orpo(beta=1.0)])
def test_orpo_conforms(check):
    check()


@conformance(
    [RECORDS["simpo"]],
    examples=[Simpo(label_smoothing=0.1), Simpo(beta=10.0, gamma=5.0), Simpo(alpha=0.25, cpo_alpha=1.0)],
)
def test_simpo_conforms(check):
    check()


@conformance([RECORDS["cpo"]], examples=[Cpo(loss_type="hinge"), Cpo(loss_type="ipo"), Cpo(cpo_alpha=0.0)])
def test_cpo_conforms(check):
    check()


@conformance([RECORDS["kto"]], examples=[Kto(desirable_weight=2.0, undesirable_weight=0.5)])
def test_kto_conforms(check):
    check()


@conformance([RECORDS["apo_zero_unpaired"]], examples=[ApoZeroUnpaired(desirable_weight=2.0, beta=10.0)])
def test_apo_zero_unpaired_conforms(check):
    check()
