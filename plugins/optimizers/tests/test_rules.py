"""Each rule against its paper's formulas in float64, or against torch's own optimizer."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import Group
from luthier.testing import expect_error
from luthier_optimizers import Adafactor, AdEMAMix, Apollo, Muon, PagedAdamW, ScheduleFree, state_bytes
from luthier_optimizers.apollo import _projection
from luthier_optimizers.averages import warmed_up
from luthier_optimizers.muon import COEFFICIENTS, orthogonalize
from luthier_optimizers.parts import (
    AdafactorPart,
    AdEMAMixPart,
    ApolloPart,
    MuonPart,
    PagedAdamWPart,
    ScheduleFreePart,
)

RATE, DECAY = 0.01, 0.1


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ran(part, gradients, start, role="hidden", rate=RATE):
    """The weight after a step with each gradient, and the optimizer."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = part.build([Group(parameters=[weight], names=["w.weight"], role=role)])
    for number, gradient in enumerate(gradients):
        weight.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate(number) if callable(rate) else rate
        optimizer.step()
    return weight.detach(), optimizer


def gradients(*shape, steps=6):
    return [drawn(*shape, seed=10 + i) for i in range(steps)]


def adam(grads, start, betas=(0.9, 0.999), eps=1e-8, decay=DECAY):
    w, m, v = start.clone(), 0, 0
    for t, g in enumerate(grads, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        w = w * (1 - RATE * decay)
        w = w - RATE * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return w


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_muon_is_torchs_on_matrices(adjust_lr, nesterov, shape):
    start, grads = drawn(*shape).float(), [g.float() for g in gradients(*shape)]
    options = Muon(adjust_lr=adjust_lr, nesterov=nesterov, weight_decay=DECAY)
    ours, _ = ran(MuonPart(options), grads, start)
    weight = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Muon([weight], lr=RATE, weight_decay=DECAY, nesterov=nesterov, adjust_lr_fn=adjust_lr)
    for g in grads:
        weight.grad = g.clone()
        theirs.step()
    moved = (weight.detach() - start).norm()
    assert (ours - weight.detach()).norm() < 0.02 * moved  # torch's iterations are in bfloat16


def test_muon_makes_singular_values_alike():
    matrix = drawn(40, 30)
    values = torch.linalg.svdvals(orthogonalize(matrix, 5))
    assert values.min() > 0.6 and values.max() < 1.3
    a, b, c = COEFFICIENTS
    expected = torch.linalg.svdvals(matrix) / matrix.norm()
    for _ in range(5):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(values.sort().values, expected.sort().values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("role", "shape"), [("embedding", (6, 4)), ("head", (6, 4)), ("norm", (5,)), ("hidden", (5,))])
def test_muon_steps_all_but_matrices_of_layers_by_adamw(role, shape):
    start, grads = drawn(*shape), gradients(*shape)
    ours, _ = ran(MuonPart(Muon(weight_decay=DECAY)), grads, start, role)
    torch.testing.assert_close(ours, adam(grads, start, decay=0.0 if role == "norm" else DECAY))


def test_adafactor_is_torchs_with_these_options():
    start, grads = drawn(6, 4).float(), [g.float() for g in gradients(6, 4)]
    options = Adafactor(beta2_decay=-0.7, clip=1.5, eps=1e-2, weight_decay=DECAY)
    ours, optimizer = ran(AdafactorPart(options), grads, start)
    weight = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Adafactor([weight], lr=RATE, beta2_decay=-0.7, eps=(None, 1e-2), d=1.5, weight_decay=DECAY)
    for g in grads:
        weight.grad = g.clone()
        theirs.step()
    assert torch.equal(ours, weight.detach())
    assert state_bytes(optimizer) < 4


@settings(max_examples=25, deadline=None)
@given(
    momentum=st.floats(0.5, 0.95), r=st.sampled_from([0.0, 1.0]), power=st.sampled_from([0.0, 2.0]),
    decay=st.sampled_from([0.0, 0.1]), warmup=st.booleans(),
)  # fmt: skip
def test_schedule_free_is_the_average_of_its_paper(momentum, r, power, decay, warmup):
    def rate(number):
        return RATE * (number + 1) / 6 if warmup else RATE

    start, grads = drawn(4, 3), gradients(4, 3)
    options = ScheduleFree(momentum=momentum, r=r, weight_lr_power=power, weight_decay=decay)
    part = ScheduleFreePart(options)
    ours, optimizer = ran(part, grads, start, rate=rate)
    z, x, y, v, total, largest = start.clone(), start.clone(), start.clone(), 0, 0.0, 0.0
    for t, g in enumerate(grads, 1):
        v = 0.999 * v + 0.001 * g**2
        move = g / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + decay * y
        z = z - rate(t - 1) * move
        largest = max(largest, rate(t - 1))
        total += t**r * largest**power
        share = t**r * largest**power / total
        x = (1 - share) * x + share * z
        y = (1 - momentum) * z + momentum * x
    torch.testing.assert_close(ours, y)
    (weight,) = optimizer.param_groups[0]["params"]
    with part.evaluating():
        torch.testing.assert_close(weight.detach(), x)
    assert torch.equal(weight.detach(), ours)
    assert state_bytes(optimizer) == 16  # of float64


@pytest.mark.parametrize("warmup", [0, 4])
def test_ademamix_adds_a_slow_momentum(warmup):
    start, grads = drawn(4, 3), gradients(4, 3)
    options = AdEMAMix(alpha=3.0, warmup_steps=warmup, weight_decay=DECAY)
    ours, optimizer = ran(AdEMAMixPart(options), grads, start)
    w, fast, slow, v = start.clone(), 0, 0, 0
    for t, g in enumerate(grads, 1):
        share = min(t / warmup, 1) if warmup else 1.0
        b3 = 0.9999
        if share < 1:  # as the paper writes it
            logs = math.log(0.9) * math.log(0.9999)
            b3 = math.exp(logs / ((1 - share) * math.log(0.9999) + share * math.log(0.9)))
        fast, slow = 0.9 * fast + 0.1 * g, b3 * slow + (1 - b3) * g
        v = 0.999 * v + 0.001 * g**2
        move = (fast / (1 - 0.9**t) + 3.0 * share * slow) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w * (1 - RATE * DECAY) - RATE * move
    torch.testing.assert_close(ours, w)
    assert state_bytes(optimizer) == 24


def test_ademamix_warms_up_from_the_fast_decay_to_the_slow_one():
    group = {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "warmup_steps": 100}
    found = [warmed_up(step, group) for step in (1, 50, 100, 200)]
    assert [round(alpha, 2) for alpha, _ in found] == [0.05, 2.5, 5.0, 5.0]
    assert 0.9 < found[0][1] < found[1][1] < found[2][1] == found[3][1] == 0.9999


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
@pytest.mark.parametrize("scale_by", ["channel", "tensor"])
def test_apollo_takes_adams_sizes_in_a_projection(shape, scale_by):
    start, grads = drawn(*shape), gradients(*shape)
    options = Apollo(rank=2, scale_by=scale_by, scale=1.5, refresh_steps=3, weight_decay=DECAY, seed=5)
    ours, optimizer = ran(ApolloPart(options), grads, start)
    turned = shape[0] > shape[1]
    w, m, v, before = start.clone(), 0, 0, None
    for t, g in enumerate(grads, 1):
        sides = g.T if turned else g
        low = _projection(sides, t, {"seed": 5, "refresh_steps": 3, "rank": 2, "number": 0}) @ sides
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        scaled = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        dim = 0 if scale_by == "channel" else None
        move = 1.5 * sides * scaled.norm(dim=dim) / low.norm(dim=dim)
        if before is not None and move.norm() > 1.01 * before:
            move = move * 1.01 * before / move.norm()
        before = move.norm()
        w = w * (1 - RATE * DECAY) - RATE * (move.T if turned else move)
    torch.testing.assert_close(ours, w)
    assert state_bytes(optimizer) == 16 * 2 * 7 / 28


def test_apollo_draws_another_projection_after_its_steps_and_another_for_each_weight():
    settings_ = {"seed": 0, "refresh_steps": 3, "rank": 2, "number": 0}
    sides = drawn(4, 7)
    drawn_at = [_projection(sides, step, settings_) for step in (1, 3, 4)]
    assert torch.equal(drawn_at[0], drawn_at[1]) and not torch.equal(drawn_at[0], drawn_at[2])
    assert not torch.equal(drawn_at[0], _projection(sides, 1, {**settings_, "number": 1}))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_paged_moments_give_the_steps_of_adamw(chunk):
    start, grads = drawn(6, 4), gradients(6, 4)
    ours, optimizer = ran(PagedAdamWPart(PagedAdamW(weight_decay=DECAY, chunk=chunk)), grads, start)
    torch.testing.assert_close(ours, adam(grads, start), rtol=1e-12, atol=1e-14)
    weight = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([weight], lr=RATE, weight_decay=DECAY)
    for g in grads:
        weight.grad = g.clone()
        theirs.step()
    torch.testing.assert_close(ours, weight.detach(), rtol=1e-12, atol=1e-14)
    assert state_bytes(optimizer) == 16


def resident(address):
    """Kilobytes in memory of the mapping at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(text, 16) for text in head.split("-"))
            inside = low <= address < high
        elif inside and head == "Rss:":
            return int(line.split()[1])
    raise AssertionError("no such mapping")


def test_paged_moments_do_not_stay_in_memory(tmp_path):
    count = 4 << 20
    part = PagedAdamWPart(PagedAdamW(folder=str(tmp_path), chunk=1 << 18))
    _, optimizer = ran(part, [torch.ones(count)], torch.zeros(count))
    (state,) = optimizer.state.values()
    for name in ("exp_avg", "exp_avg_sq"):
        assert resident(state[name].data_ptr()) < 2 << 10  # of 16 MB
        assert float(state[name][-1]) > 0
    assert not list(tmp_path.iterdir())  # the file has no name


def test_a_folder_that_cannot_take_the_pages_is_an_error_that_names_it(tmp_path):
    part = PagedAdamWPart(PagedAdamW(folder=str(tmp_path / "none")))
    with expect_error("path-unwritable", "none") as caught:
        ran(part, gradients(2, 2, steps=1), drawn(2, 2))
    assert caught.value.code == "path-unwritable" and caught.value.where == str(tmp_path / "none")


PARTS = [
    MuonPart(Muon()),
    AdafactorPart(Adafactor()),
    ScheduleFreePart(ScheduleFree()),
    AdEMAMixPart(AdEMAMix()),
    ApolloPart(Apollo()),
    PagedAdamWPart(PagedAdamW()),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name or type(part).__name__)
def test_sharded_weights_are_refused(part):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.full_tensor = lambda: weight
    with expect_error("part-unsupported") as caught:
        part.build([Group(parameters=[weight], names=["w"])])
    assert caught.value.code == "part-unsupported"
