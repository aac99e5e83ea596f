"""Merging: plain transformers gives the same logits afterwards, or the merge is refused and nothing has changed."""

import copy

import pytest
import torch
from luthier.testing.worlds import ARCHITECTURES, tiny_model
from luthier_lora import Dora, Lora
from luthier_lora.adapter import LoraAdapter
from luthier_lora.merging import wrappers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

ALL = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
FORMS = {
    "lora": Lora(target_modules="all-linear"),
    "rslora": Lora(r=3, use_rslora=True),
    "dora": Dora(target_modules="all-linear"),
    "with head": Lora(target_modules=r"lm_head|.*(proj|attn|query_key_value)"),
}
FORM = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS.keys())


class Codes(nn.Module):
    """A layer whose weight is int8 codes, in the place of nn.Linear or Conv1D."""

    def __init__(self, layer):
        super().__init__()
        weight = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("scale", weight.abs().amax() / 127)
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))
        self.bias = layer.bias

    def dense(self):
        return self.codes.float() * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense().to(x.dtype), self.bias)


def quantized(model, kinds=(nn.Linear, Conv1D)):
    """Every layer but the head in int8."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, kinds) and name != "lm_head":
            model.set_submodule(name, Codes(layer))
    return model


def weights(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


@ALL
@FORM
def test_merged_model_gives_the_same_logits_in_plain_transformers(
    attached, context, logits, tmp_path, architecture, options
):
    model, adapter = attached(options, architecture, shake=0.05)
    before = logits(model)
    merged = adapter.merge(context())
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(reloaded), before, atol=1e-5, rtol=0)
    assert not torch.allclose(before, logits(tiny_model(architecture)), atol=1e-3)


@ALL
def test_merged_model_has_the_modules_that_it_had(attached, context, architecture):
    plain = [(name, type(module)) for name, module in tiny_model(architecture).named_modules()]
    model, adapter = attached(Lora(target_modules="all-linear"), architecture)
    assert wrappers(model)
    merged = adapter.merge(context())
    assert [(name, type(module)) for name, module in merged.named_modules()] == plain
    assert not wrappers(merged)


def test_merged_experts_give_the_same_logits_in_plain_transformers(attached, context, logits, tmp_path):
    options = Lora(lora_dropout=0.0, target_parameters=["gate_up_proj", "down_proj", "mlp.gate.weight"])
    model, adapter = attached(options, "mixtral", shake=0.05)
    before = logits(model)
    merged = adapter.merge(context())
    assert not wrappers(merged)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [Lora(), Dora()], ids=["lora", "dora"])
def test_merging_a_fresh_adapter_changes_no_weight_bit(attached, context, options):
    before = weights(tiny_model())
    model, adapter = attached(options, shake=0)
    merged = weights(adapter.merge(context()))
    assert all(torch.equal(merged[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_tied_head_stays_tied_where_it_is_no_target(attached, context, architecture):
    _, adapter = attached(architecture=architecture)
    merged = adapter.merge(context())
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_tied_head_gets_a_weight_of_its_own_and_the_embedding_stays(attached, context, architecture):
    embedding = tiny_model(architecture).get_input_embeddings().weight
    _, adapter = attached(Lora(target_modules=r"lm_head|.*(o_proj|c_proj)"), architecture)
    merged = adapter.merge(context())
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not torch.equal(merged.lm_head.weight, embedding)


def test_weight_shared_by_two_layers_is_not_merged(context, refused):
    model = tiny_model()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    adapter = LoraAdapter(Lora(target_modules=["0.self_attn.q_proj"]))
    adapter.attach(model, context())
    error = refused(adapter.merge, context())
    assert error.code == "artifact-unmergeable" and "self_attn.q_proj" in str(error)


def test_tied_head_updated_as_a_parameter_is_not_merged_into_the_embedding(attached, context, refused):
    _, adapter = attached(
        Lora(lora_dropout=0.0, target_modules=["q_proj"], target_parameters=["lm_head.weight"]), "gemma2"
    )
    assert refused(adapter.merge, context()).code == "artifact-unmergeable"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("cls", [Lora, Dora])
def test_merged_quantized_layers_become_those_of_plain_transformers(context, logits, tmp_path, architecture, cls):
    given = context(dequantize=lambda layer: layer.dense())
    adapter = LoraAdapter(cls(target_modules="all-linear"))
    model = adapter.attach(quantized(tiny_model(architecture)), given)
    for parameter in adapter.groups()[0].parameters:
        nn.init.normal_(parameter, std=0.05)
    before = logits(model)
    merged = adapter.merge(given)
    plain = {name: type(module) for name, module in tiny_model(architecture).named_modules()}
    assert {name: type(module) for name, module in merged.named_modules()} == plain
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before, atol=1e-5, rtol=0)


def test_quantized_layers_merge_into_the_contexts_dtype(context):
    given = context(dequantize=lambda layer: layer.dense(), dtype=torch.bfloat16)
    adapter = LoraAdapter(Lora())
    model = adapter.attach(quantized(tiny_model()), given)
    merged = adapter.merge(given)
    layer = merged.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.bfloat16
    assert isinstance(model.model.layers[0].mlp.up_proj, Codes)  # what the adapter did not take stays quantized


def test_bfloat16_base_keeps_its_dtype_and_rounds_once(attached, context):
    model, adapter = attached(Lora(), dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    delta = 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    expected = (layer.base_layer.weight.float() + delta).bfloat16()
    merged = adapter.merge(context()).model.layers[0].self_attn.q_proj
    assert torch.equal(merged.weight, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_adapter_is_refused_before_any_weight_changes(attached, context, refused, value):
    model, adapter = attached(Lora())
    last = adapter.groups()[0]
    last.parameters[-1].data[0, 0] = value
    before = weights(model)
    error = refused(adapter.merge, context())
    assert error.code == "artifact-unmergeable"
    assert error.where == last.names[-1]
    assert all(torch.equal(p, before[name]) or p.isnan().any() for name, p in model.named_parameters())
    assert wrappers(model)


def test_nan_in_the_base_is_refused(attached, context, refused):
    model, adapter = attached(Lora())
    model.model.layers[1].self_attn.v_proj.base_layer.weight.data[3] = float("nan")
    error = refused(adapter.merge, context())
    assert (error.code, error.where) == ("artifact-unmergeable", "model.layers.1.self_attn.v_proj")


def test_overflow_of_float16_is_refused(attached, context, refused):
    model, adapter = attached(Lora(), dtype=torch.float16)
    model.model.layers[0].self_attn.q_proj.lora_B.weight.data.fill_(1e6)
    assert "leaves the range of torch.float16" in str(refused(adapter.merge, context()))


def test_merging_twice_is_refused(attached, context, refused):
    _, adapter = attached()
    adapter.merge(context())
    assert refused(adapter.merge, context()).code == "artifact-unmergeable"


def test_merged_model_takes_a_new_adapter(attached, context, logits):
    model, adapter = attached()
    merged = adapter.merge(context())
    before = logits(merged)
    again = LoraAdapter(Lora()).attach(merged, context())
    assert torch.equal(logits(again), before)


def test_every_tensor_of_the_adapter_is_in_the_merge(attached, context, logits):
    options = Lora(lora_dropout=0.0, target_modules="all-linear", target_parameters=["gate_up_proj", "down_proj"])
    for name in attached(options, "mixtral")[1].state():
        model, adapter = attached(options, "mixtral", shake=0.05)
        whole = weights(copy.deepcopy(model))
        merged = weights(adapter.merge(context()))
        model, adapter = attached(options, "mixtral", shake=0.05)
        adapter.state()[name].mul_(2)
        assert len(whole) > len(merged)
        other = weights(adapter.merge(context()))
        assert sum(not torch.equal(merged[key], other[key]) for key in merged) == 1
