"""Options that leave nothing to learn are refused by name, and log-probabilities of any size have finite gradients."""

import math

import pytest
import torch
from luthier import LuthierError, Recipe
from luthier.plugins.completion import add_defaults
from luthier.recipe import resolve_parts
from luthier.recipe.checks.soundness import check_parts
from luthier.testing import expect_error
from luthier.testing.drawn_units import DrawnUnit, lay_out_units, pack_examples
from luthier.testing.policies import TablePolicy
from luthier.testing.strategies import Document
from luthier_preference import Cpo, Dpo, Reward, Simpo
from luthier_preference.dpo import DpoLoss, weigh_tail
from luthier_preference.formulas import FORMULAS, Sides
from luthier_preference.options import DIVERGING, SMOOTHED
from luthier_preference.orpo import log_odds
from luthier_preference.reward import RewardLoss

ROWS = {"model": "demo", "data": "pairs.jsonl"}


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo", "cpo", "kto"])
def test_a_beta_of_zero_is_refused_with_the_recipe(name):
    with pytest.raises(LuthierError, match="beta") as caught:
        Recipe.from_dict({**ROWS, "loss": {"name": name, "beta": 0}})
    assert "beta" in caught.value.where


@pytest.mark.parametrize("share", [0.5, 0.7])
@pytest.mark.parametrize("options", [Dpo, Simpo, Cpo, lambda **own: Dpo(loss_type="robust", **own)])
def test_a_smoothing_of_half_the_pairs_or_more_is_refused(options, share):
    with pytest.raises(LuthierError, match="below 0.5") as caught:
        options(label_smoothing=share)
    assert caught.value.where.endswith("label_smoothing")
    assert caught.value.found == share


def test_a_recipe_with_robust_and_a_smoothing_of_a_half_is_refused_before_any_work():
    with expect_error("recipe-conflict", "loss.label_smoothing"):
        Recipe.from_dict({**ROWS, "loss": {"name": "dpo", "loss_type": "robust", "label_smoothing": 0.5}})


@pytest.mark.parametrize("name", [name for name in (*FORMULAS, "sft") if name not in SMOOTHED])
def test_a_smoothing_that_the_loss_type_would_ignore_is_refused(name):
    with expect_error("recipe-conflict", "Dpo.label_smoothing", name):
        Dpo(loss_type=name, label_smoothing=0.1)


def test_exo_pair_without_smoothing_is_refused():
    with pytest.raises(LuthierError, match="above 0"):
        Dpo(loss_type="exo_pair")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, ("Dpo.f_divergence_type", "nca_pair")),
        ({"loss_type": "hinge", "discopop_tau": 1.0}, ("Dpo.discopop_tau",)),
        ({"loss_type": "sft", "ld_alpha": 0.5}, ("Dpo.ld_alpha",)),
        ({"loss_type": ["aot", "sft"], "f_divergence_type": "forward_kl"}, ("Dpo.f_divergence_type",)),
        ({"f_alpha_divergence_coef": 2.0}, ("Dpo.f_alpha_divergence_coef",)),
        ({"loss_weights": [1.0]}, ("Dpo.loss_weights",)),
        ({"loss_type": ["hinge", "ipo"], "loss_weights": [1.0]}, ("Dpo.loss_weights", "2")),
        ({"loss_type": ["hinge", "hinge"]}, ("Dpo.loss_type",)),
        ({"loss_type": []}, ("Dpo.loss_type",)),
        ({"loss_type": ["hinge", "sigmod"]}, ("sigmod",)),
        ({"loss_type": ["sft", "exo_pair"]}, ("above 0",)),
    ],
)
def test_options_of_dpo_that_would_do_nothing_or_do_not_fit_are_refused(given, problem):
    with pytest.raises(LuthierError) as caught:
        Dpo(**given)
    assert all(fact in str(caught.value) for fact in problem)


@pytest.mark.parametrize(
    ("written", "remedy"),
    [("sigmiod", "'sigmoid'"), ("sigmoid,bco_pair", "[sigmoid, bco_pair]"), ("sigmoid, ipo", "[sigmoid, ipo]")],
)
def test_a_loss_type_that_does_not_exist_is_answered_with_what_to_write(written, remedy):
    with expect_error("recipe-wrong-type", "loss.loss_type") as caught:
        Recipe.from_dict({**ROWS, "loss": {"name": "dpo", "loss_type": written}})
    assert remedy in caught.value.remedy
    assert str(caught.value).count("discopop") == 1
    with expect_error("recipe-wrong-type", "loss.loss_type.1") as caught:
        Recipe.from_dict({**ROWS, "loss": {"name": "dpo", "loss_type": ["hinge", "sigmiod"]}})
    assert "'sigmoid'" in caught.value.remedy


def test_parts_of_a_mixture_are_each_types_weighted_share():
    document = Document(ids=(1, 2, 3), supervised=(False, True, True))
    loss = add_defaults(DpoLoss(Dpo(loss_type=["sigmoid", "hinge"], loss_weights=[1.0, 3.0])), "loss")
    batch = pack_examples(lay_out_units(loss, [DrawnUnit(documents={"chosen": document, "rejected": document})] * 2))
    metrics = loss(TablePolicy(torch.zeros(batch.num_tokens, 8)), batch).metrics
    values = {name: float(metrics[f"part/{name}"][0] / metrics[f"part/{name}"][1]) for name in ("sigmoid", "hinge")}
    assert values == pytest.approx({"sigmoid": math.log(2), "hinge": 3.0})


def test_a_batch_of_one_answer_is_refused_where_answers_are_compared():
    made = {size: Recipe.from_dict({**ROWS, "loss": "kto", "global_batch_size": size}) for size in (1, 2)}
    with expect_error("recipe-conflict", "global_batch_size"):
        check_parts(made[1], resolve_parts(made[1]), "cpu")
    check_parts(made[2], resolve_parts(made[2]), "cpu")


def sides_of(ratios):
    return Sides(ratios=ratios, logps=ratios, reference=torch.zeros_like(ratios), lengths=torch.ones_like(ratios))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", FORMULAS)
def test_log_ratios_of_any_size_have_finite_values_and_gradients(loss_type, divergence):
    sizes = torch.tensor([0.0, -3e-8, 1e3, -1e3, 1e4, -1e4])
    ratios = torch.cartesian_prod(sizes, sizes).requires_grad_(True)
    share = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
    given = {} if loss_type not in DIVERGING else {"f_divergence_type": divergence}
    values = FORMULAS[loss_type](sides_of(ratios), Dpo(loss_type=loss_type, label_smoothing=share, **given))
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(ratios.grad).all()


def batch_of(pairs):
    """Pairs of answers [1, 1, ...] of the given lengths, each after a prompt of two tokens."""

    def side(length):
        return Document(ids=(2, 3, *(1,) * length), supervised=(False, False, *(True,) * length))

    units = [DrawnUnit(documents={"chosen": side(c), "rejected": side(r)}) for c, r in pairs]
    return pack_examples(lay_out_units(add_defaults(DpoLoss(Dpo()), "loss"), units))


def test_what_an_answer_has_beyond_the_shorter_one_counts_by_ld_alpha():
    batch = batch_of([(2, 4), (3, 1)])
    weights = weigh_tail(batch, torch.zeros(batch.num_tokens), 0.25)[batch.supervised]
    assert weights.tolist() == [1, 1] + [1, 1, 0.25, 0.25] + [1, 0.25, 0.25] + [1]


def test_sorting_compares_the_answers_of_the_whole_batch_and_not_those_of_a_pair():
    ratios = torch.tensor([[1.0, -2.0], [-1.0, 2.0]])
    unpaired = FORMULAS["aot_unpaired"](sides_of(ratios), Dpo(loss_type="aot_unpaired", beta=1.0))
    expected = -torch.nn.functional.logsigmoid(torch.tensor([-1.0 - -2.0, 1.0 - 2.0]))
    torch.testing.assert_close(unpaired, expected)


def test_a_reward_token_that_the_model_lacks_is_refused_by_name():
    batch = batch_of([(1, 1)])
    loss = add_defaults(RewardLoss(Reward(token=50)), "loss")
    with expect_error("recipe-conflict", "loss.token", "8") as caught:
        loss(TablePolicy(torch.zeros(batch.num_tokens, 8)), batch)
    assert caught.value.where == "loss.token"


def test_log_odds_are_finite_and_exact_next_to_certainty():
    means = torch.tensor([0.0, -3e-8, -1e-6, -0.6931472, -30.0, -1e4], requires_grad=True)
    odds = log_odds(means)
    odds.sum().backward()
    assert torch.isfinite(odds).all()
    assert torch.isfinite(means.grad).all()
    assert odds[1:3].tolist() == pytest.approx([17.3221, 13.8155], abs=1e-4)  # log(1 - p) rounded to float32: inf
    assert odds[-1] == -1e4
