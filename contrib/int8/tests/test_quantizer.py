"""The quantizer on whole models: what it takes, what it leaves, and what it refuses."""

import copy
import json

import pytest
import torch
from luthier import LuthierError
from luthier.logs import run_log
from luthier.testing import expect_error
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_int8 import Int8
from luthier_int8.layer import Int8Linear
from luthier_int8.quantizer import Int8Quantizer
from torch import nn

IDS = torch.arange(10, 22)[None]
CONTEXT = context(tiny_model())


def quantized(architecture="llama", changes=None, **options):
    model = tiny_model(architecture, **(changes or {})).eval()
    part = Int8Quantizer(Int8(**options))
    return part.apply(model, CONTEXT), part


def int8_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral"])
def test_logits_stay_near_and_no_linear_layer_but_the_head_is_left(architecture):
    dense = tiny_model(architecture).eval()
    model, _ = quantized(architecture)
    head = model.get_output_embeddings()
    left = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    assert left == [head] and int8_names(model)
    with torch.no_grad():
        ours, theirs = model(IDS, use_cache=False).logits, dense(IDS, use_cache=False).logits
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).norm() / theirs.norm() < 0.05


def test_embeddings_norms_and_the_head_are_untouched():
    dense, (model, _) = tiny_model(), quantized()
    left = dict(model.named_parameters())
    assert left and all(torch.equal(left[name], p) for name, p in dense.named_parameters() if name in left)
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(left)


def test_a_tied_head_stays_tied():
    model, _ = quantized(changes={"tie_word_embeddings": True})
    assert "lm_head" not in int8_names(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_weight_that_two_modules_share_is_left_to_both():
    model = nn.ModuleDict({"table": nn.Embedding(4, 3), "tied": nn.Linear(3, 4), "own": nn.Linear(3, 3)})
    model["tied"].weight = model["table"].weight
    assert int8_names(Int8Quantizer(Int8()).apply(model, CONTEXT)) == {"own"}


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ("q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ("layers.1.mlp", {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}),
        ("model.layers.0.self_attn.v_proj", {"model.layers.0.self_attn.v_proj"}),
    ],
)
def test_skip_modules_leaves_a_module_and_all_inside_it(entry, left):
    everything = int8_names(quantized()[0])
    assert everything - int8_names(quantized(skip_modules=[entry])[0]) == left


@pytest.mark.parametrize("entry", ["q_porj", "proj", ""])
def test_a_skip_that_names_no_module_is_refused_before_any_layer_is_changed(entry):
    model = tiny_model()
    with expect_error("model-target", "int8.skip_modules") as caught:
        Int8Quantizer(Int8(skip_modules=["mlp", entry])).apply(model, CONTEXT)
    assert caught.value.code == "model-target" and not int8_names(model)


def test_the_refusal_names_the_near_miss():
    with pytest.raises(LuthierError, match="q_proj"):
        quantized(skip_modules=["q_porj"])


def test_group_size_is_that_of_every_layer_and_lowers_the_error():
    dense = tiny_model().model.layers[0].mlp.down_proj.weight

    def error(**options):
        layer = quantized(**options)[0].model.layers[0].mlp.down_proj
        return (layer.dense() - dense).norm().item()

    assert error(group_size=8) < error(group_size=24) < error()


def test_applying_twice_changes_nothing():
    model, part = quantized()
    before = copy.deepcopy(model.state_dict())
    layers = {name: model.get_submodule(name) for name in int8_names(model)}
    part.apply(model, CONTEXT)
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_class_and_mode_of_the_model_stay():
    dense = tiny_model().train()
    model = Int8Quantizer(Int8()).apply(dense, CONTEXT)
    assert model is dense and type(model).__name__ == "LlamaForCausalLM"
    assert all(m.training for m in model.modules())


def test_a_layer_used_in_two_places_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 4))})
    Int8Quantizer(Int8()).apply(model, CONTEXT)
    assert model["a"] is model["b"][0] and isinstance(model["a"], Int8Linear)


def test_a_subclass_with_its_own_forward_is_left():
    class Doubled(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    model = Int8Quantizer(Int8()).apply(nn.Sequential(Doubled(3, 3), nn.Linear(3, 3)), CONTEXT)
    assert type(model[0]) is Doubled and isinstance(model[1], Int8Linear)


def test_a_model_without_a_linear_layer_is_refused():
    with expect_error("part-unsupported", "Sequential"):
        Int8Quantizer(Int8()).apply(nn.Sequential(nn.LayerNorm(3)), CONTEXT)


def test_a_damaged_weight_is_refused_by_name_before_any_layer_is_changed():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LuthierError, match=r"model\.layers\.1\.mlp\.up_proj") as caught:
        Int8Quantizer(Int8()).apply(model, CONTEXT)
    assert caught.value.code == "int8:nonfinite-weight" and not int8_names(model)


def test_dequantize_and_requantize_are_inverse_and_know_their_own_layers():
    model, part = quantized()
    layer = model.model.layers[0].mlp.up_proj
    weight = part.dequantize(layer)
    assert (weight.dtype, weight.shape) == (torch.float32, (48, 32))
    changed = weight * 0.5 + 0.01
    part.requantize(layer, changed)
    assert (part.dequantize(layer) - changed).abs().max() <= changed.abs().max() / 254 * (1 + 1e-5)
    assert part.dequantize(model.lm_head) is None
    with expect_error("part-unsupported", None, "'int8'"):
        part.requantize(model.lm_head, weight)


def test_gradients_pass_through_the_whole_model_to_its_embeddings():
    model, _ = quantized()
    dense = copy.deepcopy(model)
    for name in int8_names(dense):
        layer = dense.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight.data = layer.dense()
        parent, _, last = name.rpartition(".")
        setattr(dense.get_submodule(parent), last, plain)
    for one in (model, dense):
        one(IDS, labels=IDS, use_cache=False).loss.backward()
    ours, theirs = model.model.embed_tokens.weight.grad, dense.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_log_says_how_much_is_left_exact(tmp_path):
    with run_log("run", tmp_path / "log.jsonl"):
        model, _ = quantized("mixtral")
    (line,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (line["event"], line["layers"]) == ("quantized to int8", 8)
    assert line["left_exact"] == sum(p.numel() for p in model.parameters()) > line["weights"] == 2 * 3072
