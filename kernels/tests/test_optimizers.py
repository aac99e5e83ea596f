"""AdamW in 8 bits and in float32, with rounding at random, against torch's own and against their references."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_kernels import only_implementation
from luthier_kernels.native import has_native
from luthier_kernels.optimizers import AdamW, AdamW8bit, step_eight_bits, step_floats
from luthier_kernels.optimizers.arithmetic import Rates, decode_moments, encode_moments, round_values

IMPLEMENTATIONS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not has_native("adamw"), reason="no compiler")),
]
RATES = Rates.at_step(3, 1e-2, (0.9, 0.999), 1e-8, 0.1)


def drawn(total, seed, dtype=torch.float32):
    return torch.randn(total, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trained(optimizer, model, steps=30):
    """Losses of a small regression."""
    inputs, losses = drawn(64 * 70, 0).view(64, 70), []
    target = inputs[:, :3].sum(1, keepdim=True).sin()
    for _ in range(steps):
        loss = (model(inputs.to(next(model.parameters()).dtype)).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def a_model(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(70, 80), torch.nn.Tanh(), torch.nn.Linear(80, 1)).to(dtype)


def test_in_float32_it_is_torchs_adamw():
    losses = []
    for make in (AdamW, torch.optim.AdamW):
        model = a_model()
        losses.append(trained(make(model.parameters(), lr=1e-2, weight_decay=0.1), model))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-6)


def test_in_8_bits_it_follows_float32_and_holds_two_bytes_a_parameter():
    losses = []
    for make in (AdamW8bit, AdamW):
        model = a_model()
        optimizer = make(model.parameters(), lr=1e-2)
        losses.append(trained(optimizer, model, 60))
    assert losses[0][-1] < 0.2 * losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.1, atol=0.01)
    optimizer = AdamW8bit([large := torch.nn.Parameter(torch.zeros(1 << 16))])
    large.grad = torch.ones(1 << 16)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[large].values())
    assert held / (1 << 16) < 2.04


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    total=st.sampled_from([1, 7, 255, 256, 257, 1000]), seed=st.integers(0, 99), at_random=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), grad_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_each_implementation_takes_the_step_of_the_reference(implementation, total, seed, at_random, dtype, grad_dtype):
    key = 12345 if at_random else None
    p, g, m, v = (drawn(total, seed + n) for n in range(4))
    p, g = p.to(dtype), g.to(grad_dtype)
    codes, scales = encode_moments(m, v.square())
    made = []
    for name in ("torch", implementation):
        with only_implementation(name):
            eight = [t.clone() for t in (p, *codes, *scales)]
            step_eight_bits(eight[0], g, (eight[1], eight[2]), (eight[3], eight[4]), RATES, key)
            single = [t.clone() for t in (p, m, v.square())]
            step_floats(single[0], g, (single[1], single[2]), RATES, key)
            made.append([*eight, *single])
    for one, other in zip(*made, strict=True):
        if one.dtype in (torch.int8, torch.uint8):
            assert (one.int() - other.int()).abs().max() <= 1
        else:
            near = 2**-7 if one.dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(one.float(), other.float(), rtol=near, atol=1e-5)


def test_moments_in_8_bits_are_near_and_the_second_is_never_less():
    m, v = drawn(5000, 0), drawn(5000, 1).square() + 1e-12
    again = decode_moments(*encode_moments(m, v))
    assert ((again[0] - m).norm() / m.norm()) < 0.02
    assert (again[1] >= v * (1 - 1e-5)).all() and ((again[1] - v).norm() / v.norm()) < 0.04
    zeros = decode_moments(*encode_moments(torch.zeros(300), torch.zeros(300)))
    assert not zeros[0].any() and not zeros[1].any()


def test_rounding_at_random_keeps_the_mean_and_is_the_same_for_the_same_key():
    values = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way to the next bfloat16
    one, other = (round_values(values, torch.bfloat16, key) for key in (7, 8))
    assert set(one.tolist()) == {1.0, 1.0 + 2**-7}
    assert one.double().mean() == pytest.approx(1.0 + 2**-10, abs=2e-5)
    assert torch.equal(one, round_values(values, torch.bfloat16, 7)) and not torch.equal(one, other)
    special = torch.tensor([float("inf"), float("nan"), -0.0, 1.0])
    assert torch.equal(round_values(special, torch.bfloat16, 7).isnan(), special.isnan())


def test_steps_too_small_for_bfloat16_are_not_lost_at_random():
    results = []
    for at_random in (False, True):
        p = torch.nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=1e-4, weight_decay=0.0, stochastic_rounding=at_random)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        results.append(p.detach().double().mean())
    assert results[0] == 1.0
    assert results[1] == pytest.approx(1 - 50e-4, abs=2e-4)


def test_a_resumed_optimizer_goes_on_bit_for_bit():
    model = a_model(torch.bfloat16)
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, stochastic_rounding=True, seed=3)
    trained(optimizer, model, 3)
    other = copy.deepcopy(model)
    again = AdamW8bit(other.parameters(), lr=1e-2, stochastic_rounding=True, seed=3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        again.state[q] = {name: t.clone() for name, t in optimizer.state[p].items()}
    assert trained(optimizer, model, 3) == trained(again, other, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_what_cannot_be_stepped_is_refused():
    with pytest.raises(ValueError, match="must be alike and contiguous"):
        step_floats(torch.zeros(3, 4).t(), torch.zeros(4, 3), (torch.zeros(12), torch.zeros(12)), RATES)
