"""Evolution strategies: the estimate against its formula, its mean against the gradient, the shapes of losses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier import Group
from luthier_optimizers import Evolution
from luthier_optimizers.evolution import EvolutionPart, draw_perturbation, shape_losses


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def built(*weights, **options):
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    part = EvolutionPart(Evolution(**options))
    part.build([Group(parameters=parameters, names=["w.weight"] * len(weights), role="hidden")])
    return part, parameters


@pytest.mark.parametrize("rank", [0, 2])
def test_an_estimate_is_its_formula(rank):
    part, (weight,) = built(drawn(4, 3), pairs=3, sigma=0.1, shaping="none", rank=rank)
    start, slope = weight.detach().clone(), drawn(4, 3, seed=1)
    part.estimate_gradients(lambda: float((weight * slope).sum().exp()), seed=5)
    expected = torch.zeros_like(start)
    for pair in range(3):
        e = draw_perturbation(start, torch.Generator().manual_seed(5 + pair), rank)
        up, down = (float(((start + side * 0.1 * e) * slope).sum().exp()) for side in (1, -1))
        expected += (up - down) * e / (2 * 0.1 * 3)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_many_pairs_give_the_gradient(rank):
    part, (weight,) = built(drawn(3, 4), pairs=4000, shaping="none", rank=rank)
    slope = drawn(3, 4, seed=1)
    part.estimate_gradients(lambda: float((weight * slope).sum()), seed=0)
    assert (weight.grad - slope).norm() < 0.1 * slope.norm()


def test_a_perturbation_of_low_rank_has_that_rank_and_entries_of_variance_one():
    wide = draw_perturbation(torch.empty(300, 200), torch.Generator().manual_seed(0), 3)
    assert torch.linalg.matrix_rank(wide) == 3
    assert float(wide.square().mean()) == pytest.approx(1.0, rel=0.1)
    whole = draw_perturbation(torch.empty(300, 2), torch.Generator().manual_seed(0), 3)
    assert torch.linalg.matrix_rank(whole) == 2


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=6))
def test_ranks_go_from_minus_to_plus_a_half_whatever_the_losses(losses):
    shaped = [value for pair in shape_losses(losses, "ranks") for value in pair]
    flat = [loss for pair in losses for loss in pair]
    assert sum(shaped) == pytest.approx(0.0, abs=1e-12)
    assert all((a < b) == (x < y) for a, x in zip(flat, shaped, strict=True) for b, y in zip(flat, shaped, strict=True))
    if len(set(flat)) == len(flat):
        assert sorted(shaped) == pytest.approx([i / (len(flat) - 1) - 0.5 for i in range(len(flat))])


def test_z_scores_have_no_mean_and_one_deviation_and_equal_losses_have_none():
    values = torch.tensor(shape_losses([(1.0, 2.0), (4.0, 8.0)], "z_score")).flatten()
    assert float(values.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(values.std(correction=0)) == pytest.approx(1.0)
    assert shape_losses([(3.0, 3.0)], "z_score") == [(0.0, 0.0)]


@pytest.mark.parametrize("shaping", ["ranks", "z_score", "none"])
def test_a_loss_that_is_not_finite_makes_every_gradient_so(shaping):
    part, weights = built(drawn(2, 2), drawn(3), pairs=2, shaping=shaping)
    losses = iter([1.0, 2.0, math.inf, 3.0])
    part.estimate_gradients(lambda: next(losses), seed=0)
    assert not any(torch.isfinite(weight.grad).any() for weight in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_as_they_were_also_if_the_objective_raises(dtype):
    part, (weight,) = built(drawn(5, 5, dtype=dtype))
    before = weight.detach().clone()
    with pytest.raises(ZeroDivisionError):
        part.estimate_gradients(lambda: 1 / 0, seed=0)
    assert torch.equal(weight.detach(), before) and weight.grad is None
