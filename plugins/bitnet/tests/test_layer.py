"""The ternary layer and its quantizer: what it computes, its gradients, its schedule, what is taken and refused."""

import copy

import attrs
import pytest
import torch
from luthier import LuthierError, Multipliers, Progress
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_bitnet import Bitnet, Schedule, Ternary, measure_layers
from luthier_bitnet.layer import Form, Stage, TernaryLinear
from luthier_bitnet.quantizer import TernaryQuantizer, find_layers
from torch import nn
from torch.nn import functional as F

IDS = torch.arange(10, 22)[None]


def a_layer(method="absmean", granularity="tensor", integers=False, clipped=False, share=1.0, bias=True):
    torch.manual_seed(0)
    form = Form(method=method, granularity=granularity, integers=integers, clipped=clipped)
    return TernaryLinear(nn.Linear(64, 48, bias=bias), form, Stage(share))


def quantized(options=None, architecture="llama", **changes):
    model = tiny_model(architecture, **changes).eval()
    part = TernaryQuantizer(options or Ternary())
    return part.apply(model, context(model)), part


def fake_weight(weight):
    """absmean per tensor, straight through, in plain torch."""
    scale = weight.detach().abs().mean().clamp(min=1e-5)
    return weight + ((weight.detach() / scale).round().clamp(-1, 1) * scale - weight).detach()


def fake_states(states):
    """int8 for each row, straight through, in plain torch."""
    largest = states.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return states + ((states.detach() * 127 / largest).round() * largest / 127 - states).detach()


@pytest.mark.parametrize("integers", [False, True])
def test_output_and_gradients_are_those_of_fake_quantization(integers):
    layer = a_layer(integers=integers)
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    ours, theirs = (torch.ones(5, 64).cumsum(1).sin().requires_grad_() for _ in range(2))
    upstream = torch.randn(5, 48)
    output = layer(ours)
    expected = F.linear(fake_states(theirs) if integers else theirs, fake_weight(weight), bias)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    output.backward(upstream)
    expected.backward(upstream)
    for one, other in ((ours, theirs), (layer.weight, weight), (layer.bias, bias)):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("integers", [False, True])
def test_on_its_way_it_lies_between_the_latent_and_the_ternary_layer(integers):
    states = torch.randn(5, 64)
    latent, half, whole = (a_layer(integers=integers, share=share) for share in (0.0, 0.5, 1.0))
    assert torch.equal(latent(states), F.linear(states, latent.weight, latent.bias))
    torch.testing.assert_close(half.dense(), (latent.dense() + whole.dense()) / 2)
    output = half(states.requires_grad_())
    output.sum().backward()
    torch.testing.assert_close(states.grad[0], half.dense().sum(0), rtol=1e-4, atol=1e-5)
    assert half.weight.grad is not None and torch.isfinite(half.weight.grad).all()


def test_the_clipped_estimator_passes_no_gradient_where_weights_are_far_outside():
    plain, clipped = a_layer(), a_layer(clipped=True)
    for layer in (plain, clipped):
        with torch.no_grad():
            layer.weight[0, 0] = 5.0
        layer(torch.ones(3, 64)).sum().backward()
    assert clipped.weight.grad[0, 0] == 0 and plain.weight.grad[0, 0] == 3
    outside = clipped.weight.abs() > 1.5 * clipped.rounded()[1]
    assert torch.equal(clipped.weight.grad, plain.weight.grad.masked_fill(outside, 0))


def test_codes_of_a_frozen_weight_are_made_once_and_again_when_it_changes():
    layer = a_layer()
    assert layer.rounded()[0] is not layer.rounded()[0]
    layer.weight.requires_grad_(False)
    codes = layer.rounded()[0]
    assert layer.rounded()[0] is codes
    layer.put(-layer.weight)
    assert torch.equal(layer.rounded()[0], -codes)
    other = copy.deepcopy(layer)
    assert other._codes is None and torch.equal(other.dense(), layer.dense())


def test_a_model_that_computes_in_bfloat16_keeps_its_dtype():
    model, _ = quantized(Bitnet())
    model.bfloat16()
    with torch.no_grad():
        assert model(IDS, use_cache=False).logits.dtype is torch.bfloat16


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("options", [Ternary(), Bitnet()])
def test_every_linear_layer_but_head_and_routers_is_taken(architecture, options):
    model, _ = quantized(options, architecture)
    left = {path for path, m in model.named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"}
    assert find_layers(model)
    assert {path.rpartition(".")[2] for path in left} <= {"lm_head", "embed_out", "gate", "router"}
    logits = model(IDS, labels=IDS, use_cache=False)
    logits.loss.backward()
    assert all(layer.weight.grad is not None for layer in find_layers(model).values())


def test_a_latent_weight_is_the_models_own_parameter_under_its_own_name():
    dense = tiny_model()
    names = [name for name, _ in dense.named_parameters()]
    model = TernaryQuantizer(Ternary()).apply(dense, context(dense))
    assert [name for name, _ in model.named_parameters()] == names


def test_weights_are_ternary_for_each_unit_of_their_scale():
    for options, scales in (
        (Ternary(), 1),
        (Ternary(granularity="row"), 48),
        (Ternary(granularity="group", group_size=8), 4),
    ):
        layer = quantized(options)[0].model.layers[0].mlp.up_proj  # [48, 32]
        weight = layer.dense()
        if options.granularity == "group":
            weight = weight.view(48, 4, 8)[0]
        rows = weight.reshape(scales, -1)
        assert all(len(set(row[row != 0].abs().tolist())) == 1 for row in rows)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"start_step": 2}, [0, 0, 1, 1, 1]),
        ({"start_step": 1, "end_step": 3}, [0, 0, 0.5, 1, 1]),
        ({"end_epoch": 0.5}, [0, 0.5, 1, 1, 1]),
        ({"end_step": 4, "schedule_type": "cosine"}, [0, 0.1464, 0.5, 0.8536, 1]),
        ({"end_step": 4, "schedule_type": "exponential"}, [0, 0.01690, 0.07586, 0.2817, 1]),
    ],
)
def test_a_schedule_is_followed_in_steps_or_epochs(schedule, expected):
    part = TernaryQuantizer(Ternary(schedule=Schedule(**schedule)))
    shares = []
    for step in range(5):
        part.progressed(Progress(step=step, total_steps=4, epoch=step / 4))
        shares.append(part.stage.share)
    assert shares == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"start_step": 5, "end_step": 2}, ("end_step", "2", "5")),
        ({"start_epoch": 1.0, "end_epoch": 0.5}, ("end_epoch: the schedule's end, 0.5",)),
        ({"start_epoch": 1.0, "end_step": 5}, ("end_step",)),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule, message):
    with pytest.raises(LuthierError) as caught:
        Schedule(**schedule)
    assert all(fact in str(caught.value) for fact in message)
    assert caught.value.code == "recipe-conflict"


@pytest.mark.parametrize(("end", "purpose", "warnings"), [(8, "train", 1), (4, "train", 0), (8, "open", 0)])
def test_a_run_that_ends_before_its_schedule_is_told_so_once(end, purpose, warnings, capsys):
    model = tiny_model()
    part = TernaryQuantizer(Ternary(schedule=Schedule(end_step=end)))
    part.apply(model, attrs.evolve(context(model), purpose=purpose))
    for step in (0, 3, 4, 4):
        part.progressed(Progress(step=step, total_steps=4, epoch=0.0))
    assert capsys.readouterr().err.count("the run ends before the schedule") == warnings


def test_in_the_second_stage_the_rate_falls_and_weights_decay_no_longer():
    part = TernaryQuantizer(Ternary(second_stage_start=0.5, second_stage_lr=0.25))
    found = [part.progressed(Progress(step=step, total_steps=4, epoch=0.0)) for step in range(4)]
    assert found == [Multipliers()] * 2 + [Multipliers(lr=0.25, weight_decay=0.0)] * 2
    assert part.progressed(Progress(step=9, total_steps=None, epoch=3.0)) == Multipliers()


def test_a_skip_that_names_no_module_and_a_damaged_weight_are_refused_before_any_layer_is_changed():
    with pytest.raises(LuthierError, match="q_proj"):
        quantized(Ternary(skip_modules=["q_porj"]))
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LuthierError, match=r"model\.layers\.1\.mlp\.up_proj") as caught:
        TernaryQuantizer(Bitnet()).apply(model, context(model))
    assert caught.value.code == "bitnet:nonfinite-weight" and not find_layers(model)


def test_a_checkpoint_that_is_quantized_already_is_refused_by_its_method():
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "bitnet"}
    with pytest.raises(LuthierError, match="bitnet"):
        TernaryQuantizer(Ternary()).apply(model, context(model))


def test_layers_are_measured():
    found = measure_layers(quantized(Ternary(method="absmean"), hidden_size=128)[0])
    assert len(found) == 14
    for numbers in found.values():
        assert numbers["sqnr"] == pytest.approx(5.8, abs=0.5) and numbers["zeros"] == pytest.approx(0.31, abs=0.03)
        assert 0.8 < numbers["cosine"] < 0.95 and 0 < numbers["clipped"] < 0.3


@pytest.mark.parametrize(("options", "rounds"), [(Ternary(), False), (Bitnet(), True)])
def test_a_layer_says_whether_it_rounds_activations(options, rounds):
    assert {layer.rounds_activations for layer in find_layers(quantized(options)[0]).values()} == {rounds}
