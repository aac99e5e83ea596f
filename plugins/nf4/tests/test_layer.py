"""The 4-bit layer and its quantizer against dense layers: values, gradients, what is taken and what is refused."""

import copy

import pytest
import torch
from luthier import LuthierError
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_nf4 import Fp4, Nf4
from luthier_nf4.layer import Format, FourBitLinear
from luthier_nf4.quantizer import FourBitQuantizer
from torch import nn
from transformers.pytorch_utils import Conv1D

IDS = torch.arange(10, 22)[None]


def a_layer(columns=64, rows=48, bias=True, nested=True, kind="nf4"):
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows, bias=bias)
    layer = FourBitLinear(dense, Format(kind=kind, block_size=64, nested=nested))
    layer.put(dense.weight.detach())
    return dense, layer


def quantized(architecture="llama", options=None, **changes):
    model = tiny_model(architecture, **changes).eval()
    part = FourBitQuantizer(options or Nf4())
    return part.apply(model, context(model)), part


def paths_of(model):
    return {path for path, module in model.named_modules() if isinstance(module, FourBitLinear)}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_output_and_gradient_are_those_of_the_dequantized_layer(kind, nested):
    dense, layer = a_layer(nested=nested, kind=kind)
    dense.weight.data = layer.dense()
    ours, theirs = (torch.ones(5, 64).cumsum(0).requires_grad_() for _ in range(2))
    for run, states in ((layer, ours), (dense, theirs)):
        run(states).pow(2).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-4)


def test_a_conv1d_becomes_the_layer_that_its_transposed_linear_becomes():
    torch.manual_seed(0)
    conv, linear = Conv1D(9, 64), nn.Linear(64, 9)
    linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
    model = nn.ModuleDict({"conv": conv, "linear": linear})
    FourBitQuantizer(Nf4()).apply(model, context(tiny_model()))
    assert torch.equal(model["conv"].weight, model["linear"].weight) and model["conv"].transposed
    assert torch.equal(model["conv"](torch.ones(2, 64)), model["linear"](torch.ones(2, 64)))


def test_only_the_bias_is_a_parameter_and_it_may_train():
    _, layer = a_layer()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer(torch.randn(5, 64)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((48,), 5.0))


@pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64)])
def test_a_change_of_dtype_leaves_scales_and_codes_as_they_are(change):
    _, layer = a_layer()
    before = {name: t.clone() for name, t in layer.named_buffers()}
    change(nn.Sequential(layer))
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in layer.named_buffers())


def test_under_autocast_it_computes_in_autocasts_dtype():
    _, layer = a_layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 64)).dtype is torch.bfloat16


def test_it_holds_as_many_bytes_as_it_says():
    _, layer = a_layer(1024, 256, bias=False)
    held = sum(t.numel() * t.element_size() for t in layer.buffers())
    assert held * 8 / (1024 * 256) == pytest.approx(4.127, abs=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral"])
def test_no_linear_layer_but_the_head_is_left_and_logits_stay_near(architecture):
    dense, (model, _) = tiny_model(architecture).eval(), quantized(architecture)
    left = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    assert left == [model.get_output_embeddings()] and paths_of(model)
    with torch.no_grad():
        ours, theirs = model(IDS, use_cache=False).logits, dense(IDS, use_cache=False).logits
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.5


def test_fp4_is_another_code_than_nf4():
    dense = tiny_model().model.layers[0].mlp.up_proj.weight
    errors = [
        (quantized(options=options)[0].model.layers[0].mlp.up_proj.dense() - dense).norm() for options in (Nf4(), Fp4())
    ]
    assert errors[0] < 0.9 * errors[1]


def test_block_size_and_double_quantization_reach_every_layer():
    def bits(**options):
        model, part = quantized(options=Nf4(**options), hidden_size=128)
        layers = [m for m in model.modules() if isinstance(m, FourBitLinear)]
        assert len(layers) == 14
        return sum(m.held().count_bytes() for m in layers)

    assert bits(block_size=256) < bits() < bits(use_double_quant=False) < bits(use_double_quant=False, block_size=32)


def test_a_skipped_module_stays_dense_and_one_that_does_not_exist_is_refused_with_the_nearest():
    left = paths_of(quantized()[0]) - paths_of(quantized(options=Nf4(skip_modules=["layers.1.mlp"]))[0])
    assert left == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    with pytest.raises(LuthierError, match="q_proj") as caught:
        quantized(options=Nf4(skip_modules=["q_porj"]))
    assert caught.value.code == "model-target"


def test_a_damaged_weight_is_refused_by_name_before_any_layer_is_changed():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(LuthierError, match=r"model\.layers\.1\.mlp\.up_proj") as caught:
        FourBitQuantizer(Nf4()).apply(model, context(model))
    assert caught.value.code == "nf4:nonfinite-weight" and not paths_of(model)


def test_a_checkpoint_that_is_quantized_already_is_refused_by_its_method():
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(LuthierError, match="bitsandbytes") as caught:
        FourBitQuantizer(Nf4()).apply(model, context(model))
    assert caught.value.code == "part-unsupported"


def test_a_second_apply_changes_nothing():
    model, part = quantized()
    before, layers = copy.deepcopy(model.state_dict()), {path: model.get_submodule(path) for path in paths_of(model)}
    part.apply(model, context(model))
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_without_values_the_same_layers_are_made_on_the_models_device():
    import attrs

    model = tiny_model().to("meta")
    part = FourBitQuantizer(Nf4())
    part.apply(model, attrs.evolve(context(tiny_model()), purpose="hollow", has_values=False))
    held = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    assert held == {name: (t.shape, t.dtype) for name, t in quantized()[0].state_dict().items()}
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_a_lent_weight_computes_what_it_computes_on_the_dense_one(dtype):
    from luthier_lora.product import adapted_product

    _, layer = a_layer(bias=False)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    made = []
    for weight in (layer.lend_weight, layer.dense().to(dtype)):
        states = torch.ones(5, 64).cumsum(0).to(dtype).requires_grad_()
        a.grad = b.grad = None
        output = adapted_product(states, weight, None, a, b, 2.0)
        output.sum().backward()
        made.append((output.detach(), states.grad, a.grad, b.grad))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_what_is_lent_is_the_same_memory_for_all_layers():
    layers = [a_layer()[1], a_layer(32, 16)[1]]
    lent = [layer.lend_weight(torch.bfloat16) for layer in layers]
    assert lent[0].data_ptr() == lent[1].data_ptr() and lent[1].shape == (16, 32)
    assert torch.equal(lent[1], layers[1].dense().bfloat16())
