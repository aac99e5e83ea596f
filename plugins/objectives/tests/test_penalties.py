"""Penalties: exact sums over the weights that count, and their gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier import Group
from luthier.testing import TablePolicy, conformance
from luthier.testing.policies import random_table
from luthier.testing.worlds import random_batch
from luthier_objectives import L1, L2, Kl, L2Start, TernaryDistance, luthier_penalties
from luthier_objectives.penalties import L1Penalty, L2Penalty, StartPenalty, TernaryPenalty
from luthier_objectives.token_penalties import KlPenalty


@conformance(luthier_penalties())
def test_a_penalty_conforms(check):
    check()


def groups_of(seed, scale=1.0):
    torch.manual_seed(seed)
    weight, bias = (torch.nn.Parameter(scale * torch.randn(shape, dtype=torch.float64)) for shape in ((3, 4), (3,)))
    return [Group(parameters=[weight], names=["w"], role="hidden"), Group(parameters=[bias], names=["b"], role="bias")]


FORMULAS = [
    (L1Penalty, L1, lambda w: w.abs().sum(), lambda w: w.sign()),
    (L2Penalty, L2, lambda w: (w * w).sum(), lambda w: 2 * w),
]


@given(seed=st.integers(0, 99), scale=st.sampled_from((1e-3, 1.0, 1e3)), share=st.floats(0.0, 10.0))
@pytest.mark.parametrize(("part", "options", "value", "slope"), FORMULAS, ids=["l1", "l2"])
def test_the_value_and_the_gradient_are_those_of_the_formula(part, options, value, slope, seed, scale, share):
    groups = groups_of(seed, scale)
    (weight,), (bias,) = (group.parameters for group in groups)
    found = part(options(weight=share)).measure(groups)
    torch.testing.assert_close(found, share * value(weight), rtol=1e-12, atol=0.0)
    found.backward()
    torch.testing.assert_close(weight.grad, share * slope(weight.detach()), rtol=1e-12, atol=0.0)
    assert bias.grad is None  # norms and biases are left out
    both = part(options(weight=share, all_roles=True)).measure(groups)
    torch.testing.assert_close(both, share * (value(weight) + value(bias)), rtol=1e-12, atol=0.0)


@given(seed=st.integers(0, 99), share=st.floats(0.0, 10.0))
def test_the_pull_to_the_start_has_the_value_and_the_gradient_of_the_squared_distance(seed, share):
    groups, start = groups_of(seed), groups_of(seed + 1)
    penalty = StartPenalty(L2Start(weight=share))
    penalty.begin(start)
    distance = groups[0].parameters[0].detach() - start[0].parameters[0].detach()
    found = penalty.measure(groups)
    torch.testing.assert_close(found.detach(), share * distance.square().sum(), rtol=1e-12, atol=0.0)
    found.backward()
    torch.testing.assert_close(groups[0].parameters[0].grad, 2 * share * distance, rtol=1e-12, atol=0.0)
    penalty.begin(groups)
    assert penalty.measure(groups) == 0.0


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_the_divergence_from_the_reference_is_that_of_the_whole_distributions(divergence):
    batch = random_batch()
    policy = TablePolicy(random_table(batch.num_tokens, 9, seed=3))
    found = KlPenalty(Kl(weight=0.5, divergence=divergence)).measure_tokens(policy, batch)
    for position in range(batch.num_tokens):
        source = batch.previous[position]
        sides = [p.logits[source].softmax(-1) for p in (policy, policy.reference())]
        one, other = sides if divergence == "reverse_kl" else sides[::-1]
        expected = 0.5 * (one * (one / other).log()).sum() if batch.labels[position] >= 0 else torch.zeros(())
        torch.testing.assert_close(found[position], expected.to(found), rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 99))
def test_the_distance_is_nought_at_three_values_and_pulls_towards_them(seed):
    groups = groups_of(seed)
    ((weight,), _), penalty = (group.parameters for group in groups), TernaryPenalty(TernaryDistance(weight=1.0))
    scale = weight.detach().abs().mean()
    nearest = torch.stack([torch.full_like(weight, v) * scale for v in (-1.0, 0.0, 1.0)]).detach()
    apart = (weight.detach() - nearest).square().min(0).values
    found = penalty.measure(groups[:1])
    torch.testing.assert_close(found.detach(), apart.sum(), rtol=1e-9, atol=1e-12)
    found.backward()
    torch.testing.assert_close(weight.grad.square() / 4, apart, rtol=1e-9, atol=1e-12)
    exact = torch.nn.Parameter(torch.tensor([[2.0, -2.0, 2.0, -2.0]]))
    at_rest = [Group(parameters=[exact], names=["w"], role="hidden")]
    assert penalty.measure(at_rest) == 0.0


def test_weights_of_low_precision_are_added_in_float32_and_nothing_counts_for_nothing():
    weight = torch.nn.Parameter(torch.full((1000,), 0.01, dtype=torch.bfloat16))
    found = L1Penalty(L1(weight=1.0)).measure([Group(parameters=[weight], names=["w"], role="hidden")])
    assert found.dtype is torch.float32
    assert found.detach().item() == pytest.approx(1000 * float(weight[0].detach()), rel=1e-5)
    assert L2Penalty(L2()).measure([Group(parameters=[weight], names=["b"], role="bias")]) is None
