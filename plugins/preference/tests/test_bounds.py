"""Options that leave nothing to learn are refused by name, and log-probabilities of any size have finite gradients."""

import pytest
import torch
from luthier import LuthierError, Recipe
from luthier_preference import Cpo, Dpo, Simpo
from luthier_preference.dpo import FORMULAS
from luthier_preference.orpo import log_odds

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
    with pytest.raises(LuthierError, match="nothing to learn"):
        Recipe.from_dict({**ROWS, "loss": {"name": "dpo", "loss_type": "robust", "label_smoothing": 0.5}})


@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in ("sigmoid", "robust", "exo_pair")])
def test_a_smoothing_that_the_loss_type_would_ignore_is_refused(name):
    with pytest.raises(LuthierError, match="no label smoothing"):
        Dpo(loss_type=name, label_smoothing=0.1)


def test_exo_pair_without_smoothing_is_refused():
    with pytest.raises(LuthierError, match="above 0"):
        Dpo(loss_type="exo_pair")


@pytest.mark.parametrize("loss_type", FORMULAS)
def test_log_ratios_of_any_size_have_finite_values_and_gradients(loss_type):
    sizes = torch.tensor([0.0, -3e-8, 1e3, -1e3, 1e4, -1e4])
    ratios = torch.cartesian_prod(sizes, sizes).requires_grad_(True)
    share = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
    values = FORMULAS[loss_type](ratios, torch.ones_like(ratios), Dpo(loss_type=loss_type, label_smoothing=share))
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(ratios.grad).all()


def test_log_odds_are_finite_and_exact_next_to_certainty():
    means = torch.tensor([0.0, -3e-8, -1e-6, -0.6931472, -30.0, -1e4], requires_grad=True)
    odds = log_odds(means)
    odds.sum().backward()
    assert torch.isfinite(odds).all()
    assert torch.isfinite(means.grad).all()
    assert odds[1:3].tolist() == pytest.approx([17.3221, 13.8155], abs=1e-4)  # log(1 - p) rounded to float32: inf
    assert odds[-1] == -1e4
