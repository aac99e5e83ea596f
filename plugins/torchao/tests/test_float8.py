"""Float8 training besides torchao's own layers, what stays exact, what is refused, and runs that go on and are saved."""

import dataclasses

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.step.opened import open_artifact
from luthier.testing import context
from luthier.testing.worlds import save_tiny_model, tiny_model
from luthier_torchao import TorchaoFloat8
from luthier_torchao.float8_layer import Float8TrainingLinear, Rounding
from luthier_torchao.float8_quantizer import Float8Quantizer, check_device
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
ROWS_OF_DATA = [{"prompt": f"{i}?", "completion": "yes"} for i in range(8)]


def both(recipe_name, emulate, dtype=torch.float32):
    """A layer of ours and one of torchao's with the same weights."""
    torch.manual_seed(0)
    dense, other = (nn.Linear(64, 32, dtype=dtype) for _ in range(2))
    other.load_state_dict(dense.state_dict())
    named = Float8LinearConfig.from_recipe_name(recipe_name)
    config = dataclasses.replace(named, emulate=emulate, pad_inner_dim=True)
    made = Float8TrainingLinear(dense, Rounding.of(recipe_name, emulate))
    return made, convert_to_float8_training(other, config=config)


@pytest.mark.parametrize("recipe_name", RECIPES)
@pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7)], ids=str)
def test_outputs_and_gradients_are_torchaos_bit_for_bit(recipe_name, emulate, dtype, shape):
    layers = both(recipe_name, emulate, dtype)
    drawn, upstream = torch.randn(*shape, 64, dtype=dtype), torch.randn(*shape, 32, dtype=dtype)
    found = []
    for layer in layers:
        states = drawn.clone().requires_grad_()
        output = layer(states)
        output.backward(upstream)
        found.append([output, states.grad, layer.weight.grad, layer.bias.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recipe_name", RECIPES)
def test_emulated_products_are_those_of_the_device_within_rounding(recipe_name):
    states = torch.randn(5, 64)
    outputs = [both(recipe_name, emulate)[0](states) for emulate in (True, False)]
    dense = both(recipe_name, True)[0].eval()(states)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.02)
    assert 0.005 < (outputs[0] - dense).norm() / dense.norm() < 0.06


def test_recipes_round_differently():
    states = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    outputs = {name: both(name, True)[0](states) for name in RECIPES}
    assert not torch.equal(outputs["tensorwise"], outputs["rowwise"])
    small = {name: both(name, True)[0].eval()(states)[0] - value[0] for name, value in outputs.items()}
    assert small["rowwise"].norm() < small["tensorwise"].norm() / 10  # which rounds a row of small numbers to nothing


def test_evaluation_and_an_empty_batch_multiply_by_the_exact_weight():
    layer = both("tensorwise", False)[0]
    states = torch.randn(5, 64)
    expected = nn.functional.linear(states, layer.weight, layer.bias)
    assert not torch.equal(layer(states), expected)
    assert torch.equal(layer.eval()(states), expected)
    assert layer.train()(states[:0]).shape == (0, 32)


def test_a_frozen_weight_gets_no_gradient_and_a_transposed_one_its_own():
    layer = both("tensorwise", False)[0]
    layer.weight.requires_grad_(False)
    states = torch.randn(5, 64, requires_grad=True)
    layer(states).sum().backward()
    assert layer.weight.grad is None and states.grad is not None
    turned = Conv1D(32, 64)
    turned.weight.data = layer.weight.detach().T.clone()
    other = Float8TrainingLinear(turned, layer.rounding)
    other.bias = layer.bias
    assert torch.equal(other(states), layer(states))
    other(states).sum().backward()
    assert other.weight.grad.shape == (64, 32)


def test_layers_of_uneven_sizes_and_skipped_ones_stay_exact():
    model = tiny_model(intermediate_size=40)
    part = Float8Quantizer(TorchaoFloat8(skip_modules=["q_proj"]))
    part.apply(model, context(model))
    taken = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, Float8TrainingLinear)}
    assert taken == {"k_proj", "v_proj", "o_proj"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_cannot_multiply_in_float8_is_refused_with_the_way_out():
    with pytest.raises(LuthierError) as caught:
        check_device(torch.device("cuda"), Rounding.of("tensorwise", emulate=False))
    assert caught.value.code == "part-unsupported" and "emulate: true" in caught.value.remedy


def test_a_weight_that_is_no_number_is_refused():
    model = tiny_model()
    next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.data[0, 0] = float("inf")
    with pytest.raises(LuthierError) as caught:
        Float8Quantizer(TorchaoFloat8()).apply(model, context(model))
    assert caught.value.code == "torchao:nonfinite-weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("float8") / "model", "llama")


def train(folder, output, **settings):
    given = {"quantizer": "torchao.float8", "adapter": "full", "max_steps": 4, "save_steps": 1, **settings}
    return luthier.train(
        model=str(folder), data=ROWS_OF_DATA, learning_rate=1e-2, num_threads=1, output_dir=output,
        **{"exact_callbacks": [], **given},
    )  # fmt: skip


def test_a_full_run_is_saved_as_a_dense_model_of_its_exact_weights(folder, tmp_path):
    run = train(folder, tmp_path / "run")
    assert run.loss_history[-1] < run.loss_history[0]
    dense = AutoModelForCausalLM.from_pretrained(run.artifact, local_files_only=True)
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight, dense.get_parameter(name)), name
    again = train(run.artifact, tmp_path / "again", quantizer="none")
    assert again.loss_history[0] < run.loss_history[0]


def test_an_adapter_on_float8_layers_is_opened_and_merged(folder, tmp_path):
    run = train(folder, tmp_path / "run", adapter="lora", merge=True)
    opened = open_artifact(tmp_path / "run").model.state_dict()
    assert all(torch.equal(opened[name], value) for name, value in run.model.state_dict().items())
    merged = AutoModelForCausalLM.from_pretrained(run.merged, local_files_only=True)
    base = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    path = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.get_parameter(path), base.get_parameter(path))


def cut_after_two(step):
    if step == 2:
        raise RuntimeError("power cut")


@pytest.mark.parametrize("recipe_name", RECIPES[:2])
def test_a_run_that_broke_off_goes_on_bit_for_bit(folder, tmp_path, recipe_name):
    quantizer = {"name": "torchao.float8", "recipe_name": recipe_name}
    straight = train(folder, tmp_path / "straight", quantizer=quantizer)
    with pytest.raises(RuntimeError, match="power cut"):
        train(folder, tmp_path / "cut", quantizer=quantizer, exact_callbacks=[luthier.on(step_ended=cut_after_two)])
    resumed = train(folder, tmp_path / "cut", quantizer=quantizer)
    assert resumed.loss_history[-2:] == straight.loss_history[-2:]
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
