"""Evenly spaced levels: known answers, gradients by hand formulas, ranges, schedules, calibration."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError, Progress
from luthier.logs import set_up
from luthier.testing import expect_error
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_bitnet import Qat, QatActivations, Schedule, measure_layers
from luthier_bitnet.measures import flip_rate, measure_weights
from luthier_bitnet.uniform.grid import Estimator, Levels, quantize_values
from luthier_bitnet.uniform.layer import Phase, UniformLinear
from luthier_bitnet.uniform.observers import Range, divergence, observe, squared_error
from luthier_bitnet.uniform.quantizer import UniformQuantizer, find_uniform
from torch import nn

IDS = torch.arange(10, 34)[None]
BITS = [1, 1.58, 2, 4, 8]


def quantized(options, steps=None, total=10):
    model = tiny_model().eval()
    part = UniformQuantizer(options)
    model = part.apply(model, context(model))
    if steps is not None:
        part.progressed(Progress(step=steps, total_steps=total, epoch=steps / total))
    return model, part


def a_layer(options, seed=0):
    torch.manual_seed(seed)
    part = UniformQuantizer(options)
    layer = UniformLinear(nn.Linear(24, 10), "a.layer", part._weights(), part._activations())
    layer.prepare(part.phase, has_values=True)
    return layer


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_each_unit_of_weights_takes_no_more_values_than_its_bits_have(bits, granularity):
    layer = a_layer(Qat(bits=bits, granularity=granularity, group_size=10))
    dense = layer.dense()
    units = {"tensor": [dense], "row": dense.split(1), "group": [g for r in dense.split(1) for g in r.split(10, 1)]}
    most = {1: 2, 1.58: 3}.get(bits) or 2**bits
    for unit in units[granularity]:
        found = unit.unique()
        assert len(found) <= most
        step = found.abs()[found != 0].min() if bits == 1.58 else None
        assert step is None or torch.allclose(found.abs()[found != 0], step)


@pytest.mark.parametrize(("per_channel", "granularity"), [(True, "row"), (False, "tensor")])
def test_per_channel_is_another_name_of_granularity(per_channel, granularity):
    named, expected = a_layer(Qat(per_channel=per_channel)), a_layer(Qat(granularity=granularity))
    assert torch.equal(named.dense(), expected.dense())
    assert not torch.equal(named.dense(), a_layer(Qat(per_channel=not per_channel)).dense())


@pytest.mark.parametrize(("per_channel", "granularity"), [(True, "tensor"), (True, "group"), (False, "group")])
def test_per_channel_and_another_granularity_are_refused(per_channel, granularity):
    with expect_error("recipe-conflict", "per_channel", granularity):
        Qat(per_channel=per_channel, granularity=granularity)


def test_known_answers():
    values = torch.tensor([[-1.0, -0.4, 0.1, 0.6, 1.0]])
    cases = {
        (2, True): [-1.0, 0.0, 0.0, 1.0, 1.0],  # codes -2..1 in steps of 1
        (2, False): [-4 / 3, -2 / 3, 0.0, 2 / 3, 2 / 3],  # codes 0..3, of which 2 is 0
    }
    for (bits, symmetric), expected in cases.items():
        levels = Levels.of(bits, symmetric)
        scale, zero = levels.lay(Range(low=values.amin(-1, keepdim=True), high=values.amax(-1, keepdim=True)))
        found = quantize_values(values, scale, zero, levels, Estimator())
        torch.testing.assert_close(found, torch.tensor([expected]))
    signs = Levels.of(1, True)
    found = quantize_values(values, *signs.lay(observe(values, signs, "minmax")), signs, Estimator())
    torch.testing.assert_close(found, 0.62 * torch.tensor([[-1.0, -1, 1, 1, 1]]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans(), shift=st.floats(-3, 3))
def test_within_its_range_no_value_is_further_off_than_half_a_step(seed, bits, symmetric, shift):
    values = drawn(3, 50, seed=seed) + shift
    levels = Levels.of(bits, symmetric)
    scale, zero = levels.lay(observe(values, levels, "minmax"))
    off = (quantize_values(values, scale, zero, levels, Estimator()) - values).abs()
    assert bool((off <= scale * (0.5 if symmetric else 1.0) + 1e-5).all())  # a rounded zero shifts the ends by half
    assert not symmetric or bool((quantize_values(-values.abs() * 0, scale, zero, levels, Estimator()) == 0).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["straight_through", "clipped", "soft"])
def test_gradients_of_weights_and_scales_are_those_of_the_hand_formula(bits, kind):
    levels, temperature = Levels.of(bits, True), 3.0
    values = (3 * drawn(4, 20, dtype=torch.float64)).requires_grad_()
    scale = torch.full((4, 1), 0.4, dtype=torch.float64).requires_grad_()
    upstream = drawn(4, 20, seed=1, dtype=torch.float64)
    quantize_values(
        values, scale, torch.zeros_like(scale), levels, Estimator(kind=kind, temperature=temperature)
    ).backward(upstream)
    steps = values.detach() / 0.4
    inside = (steps >= levels.low) & (steps <= levels.high)
    slope = torch.ones_like(steps) if kind == "straight_through" else inside.double()
    if kind == "soft":
        away = steps if bits == 1 else steps - steps.floor() - 0.5
        slope = slope * temperature / 2 * (1 - torch.tanh(temperature * away) ** 2) / math.tanh(temperature / 2)
    torch.testing.assert_close(values.grad, upstream * slope)
    codes = torch.where(steps < 0, -1.0, 1.0).double() if bits == 1 else steps.round().clamp(levels.low, levels.high)
    expected = torch.where(inside, codes - steps, codes)
    torch.testing.assert_close(scale.grad, (upstream * expected).sum(1, keepdim=True))


def test_a_soft_staircase_is_flat_when_cold_and_steep_when_hot():
    steps, levels = torch.linspace(-1.4, 1.4, 57), Levels.of(4, True)
    cold = Estimator(kind="soft", temperature=1e-2).slope(steps, levels)
    torch.testing.assert_close(cold, torch.ones_like(cold), rtol=1e-3, atol=1e-3)
    hot = Estimator(kind="soft", temperature=50.0).slope(torch.tensor([0.0, 0.5]), levels)
    assert hot[0] < 1e-9 and hot[1] > 20


def test_a_learned_scale_is_trained_with_the_gradient_of_lsq():
    layer = a_layer(Qat(bits=4, learn_scale=True))
    states, upstream = drawn(7, 24), drawn(7, 10, seed=1)
    layer(states).backward(upstream)
    weight, scale = layer.weight.detach(), layer.scale.detach()[:, None]
    steps = weight / scale
    inside = (steps >= -8) & (steps <= 7)
    codes = steps.round().clamp(-8, 7)
    to_weight = upstream.T @ states
    torch.testing.assert_close(layer.weight.grad, to_weight * inside)
    expected = (to_weight * torch.where(inside, codes - steps, codes)).sum(1) / math.sqrt(24 * 7)
    torch.testing.assert_close(layer.scale.grad, expected)
    frozen = a_layer(Qat(bits=4))
    assert [name for name, _ in frozen.named_parameters()] == ["weight", "bias"]


def test_observers_leave_outliers_out_and_lower_their_own_error():
    values = drawn(4, 2000)
    values[:, 0] = 40.0
    levels = Levels.of(4, True)
    found = {name: observe(values, levels, name, 99.0) for name in ("minmax", "percentile", "mse", "kl")}
    errors = {name: float(squared_error(values, around, levels).mean()) for name, around in found.items()}
    assert errors["mse"] < errors["minmax"] and errors["mse"] <= min(errors.values()) + 1e-9 + errors["percentile"]
    apart = {name: float(divergence(values, around, levels).mean()) for name, around in found.items()}
    assert apart["kl"] <= min(apart["minmax"], apart["mse"])
    assert float(found["minmax"].high.max()) == 40.0 and float(found["percentile"].high.max()) < 4
    torch.testing.assert_close(found["percentile"].high, values.quantile(0.995, dim=-1, keepdim=True), atol=0.2, rtol=0)


def test_noise_is_of_so_many_steps_seeded_and_in_training_only():
    layer, quiet = a_layer(Qat(bits=4, noise_factor=0.2)), a_layer(Qat(bits=4))
    eye = torch.eye(24)
    layer.bias.data.zero_()
    quiet.bias.data.zero_()
    noise = (layer(eye) - quiet(eye)).T
    scale = quiet._fit(quiet.latent().detach())[0]
    assert float((noise / scale).std()) == pytest.approx(0.2, rel=0.15)
    assert torch.equal(layer(eye), layer(eye))
    layer.phase.step = 1
    assert not torch.equal((layer(eye) - quiet(eye)).T, noise)
    layer.eval()
    assert torch.equal(layer(eye), quiet(eye))


@pytest.mark.parametrize("by", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_are_within_half_a_step_of_their_range(by, symmetric):
    options = QatActivations(activation_bits=8, activation_symmetric=symmetric, activation_granularity=by)
    layer = a_layer(options)
    states = drawn(2, 5, 24) + 2
    rounded = layer._quantize_states(states, layer.activations)
    dim = -1 if by == "token" else None
    low, high = states.amin(dim, keepdim=True).clamp(max=0), states.amax(dim, keepdim=True).clamp(min=0)
    step = torch.maximum(high, -low) / 127 if symmetric else (high - low) / 255
    assert bool(((rounded - states).abs() <= step / 2 + 1e-6).all())
    assert by == "token" or len(rounded.unique()) <= 256


def test_online_calibration_measures_at_its_cadence_and_follows_what_shifts():
    options = QatActivations(
        activation_granularity="tensor", online_calibration=True, calibration_frequency=3, calibration_samples=8,
        calibration_decay=0.5,
    )  # fmt: skip
    model, part = quantized(options)
    model.train()
    layer = find_uniform(model)["model.layers.0.mlp.up_proj"]
    highs = []
    for step in range(7):
        part.progressed(Progress(step=step, total_steps=7, epoch=0.0))
        layer(torch.full((4, 8, 32), 1.0 + step))
        layer(torch.full((4, 8, 32), 50.0))  # a second micro-batch measures nothing
        highs.append(float(layer.range[1]))
    assert highs == [1.0, 1.0, 1.0, 2.5, 2.5, 2.5, 4.75]
    model.eval()
    layer(torch.full((1, 8, 32), 99.0))
    assert float(layer.range[1]) == 4.75
    held = part.state()
    _, other = quantized(options)
    other.load_state(held)
    assert torch.equal(other.layers["model.layers.0.mlp.up_proj"].range, layer.range)


def test_a_measurement_of_too_few_tokens_is_an_error_that_names_the_layer():
    options = QatActivations(activation_granularity="tensor", online_calibration=True)
    model, part = quantized(options, steps=0)
    with expect_error("part-unsupported", "model.layers.0.self_attn.q_proj", "24", "512") as caught:
        model.train()(input_ids=IDS, use_cache=False)
    assert caught.value.code == "part-unsupported" and "layers.0" in caught.value.where


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
def test_a_schedule_goes_from_the_latent_weight_to_the_quantized_one(kind):
    options = Qat(bits=2, schedule=Schedule(start_step=2, end_step=8, schedule_type=kind))
    model, part = quantized(options, steps=1)
    layer = next(iter(find_uniform(model).values()))
    assert torch.equal(layer.dense(), layer.latent())
    part.progressed(Progress(step=8, total_steps=10, epoch=0.8))
    whole = layer.dense()
    part.progressed(Progress(step=5, total_steps=10, epoch=0.5))
    share = options.schedule.share(Progress(step=5, total_steps=10, epoch=0.5))
    torch.testing.assert_close(layer.dense(), layer.latent() + share * (whole - layer.latent()))
    assert share == pytest.approx({"linear": 0.5, "cosine": 0.5, "exponential": 0.0759}[kind], abs=1e-3)


def test_stages_of_bits_follow_each_other_and_each_beginning_is_logged(capsys):
    model, part = quantized(Qat(bits=2, bits_stages=[8.0, 4.0]))
    layer = next(iter(find_uniform(model).values()))
    seen = []
    set_up("info", "json")
    for step in range(9):
        part.progressed(Progress(step=step, total_steps=9, epoch=0.0))
        seen.append(layer.phase.bits)
        assert len(layer.dense()[0].unique()) <= 2**layer.phase.bits
    assert seen == [8, 8, 8, 4, 4, 4, 2, 2, 2]
    set_up("warning")
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["step"], line["bits"]) for line in told if line["event"] == "stage"] == [(0, 8), (3, 4), (6, 2)]


def test_measures_have_known_answers():
    latent = torch.tensor([[3.0, -1.0, 0.0, 2.0]])
    dense = torch.tensor([[1.0, -1.0, 0.0, 1.0]])
    found = measure_weights(dense, latent)
    assert found["mse"] == 1.25 and found["sqnr"] == pytest.approx(10 * math.log10(3.5 / 1.25))
    assert found["cosine"] == pytest.approx(6 / math.sqrt(3 * 14))
    assert (found["zeros"], found["clipped"]) == (0.25, 0.5)
    assert flip_rate(dense, torch.tensor([[2.0, 0.0, 0.0, 2.0]])) == 0.25
    model, _ = quantized(Qat(bits=8))
    measures = measure_layers(model)
    assert len(measures) == 14 and all(m["sqnr"] > 35 for m in measures.values())


CONFLICTS = [
    ({"learn_scale": True, "symmetric": False}, ("symmetric",)),
    ({"learn_scale": True, "bits_stages": [8.0]}, ("bits_stages",)),
    ({"bits": 1, "symmetric": False}, ("symmetric",)),
]


@pytest.mark.parametrize(("options", "message"), CONFLICTS)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(LuthierError) as caught:
        Qat(**options)
    assert all(fact in str(caught.value) for fact in message)
    assert caught.value.code == "recipe-conflict"


def test_a_range_that_is_kept_is_not_one_for_each_token():
    with expect_error("recipe-conflict", "activation_granularity"):
        QatActivations(online_calibration=True)


@pytest.mark.parametrize(
    "given", [{"calibration_frequency": 9}, {"calibration_samples": 9}, {"calibration_decay": 0.9}]
)
def test_a_calibration_that_is_not_asked_for_takes_no_options(given):
    with expect_error("recipe-conflict", *given):
        QatActivations(activation_granularity="tensor", **given)


def test_a_fitted_scale_is_made_again_when_the_weight_changes():
    layer = a_layer(Qat(bits=4))
    first = layer.quantized()
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer.quantized(), 2 * first)
    assert layer.phase == Phase(bits=4)
