"""Queries, keys and values that a policy gives: those with which the model itself attends, whatever computes them."""

import pytest
import torch
from exact_models import APART, MODELS, exact_model
from luthier.builtin.full import FullTuning
from luthier.data.batches.batch import chain_of, continue_documents
from luthier.model import attention, recompute
from luthier.model.attention import ordinary_attention
from luthier.model.policy import ModelPolicy
from luthier.plugins.records import NoOptions
from luthier.testing import expect_error
from luthier.testing.contexts import context
from luthier.testing.exactness import unrounded
from luthier.testing.worlds import random_batch, tiny_model
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LENGTHS, LINKS = (7, 4, 6, 3, 5), (-1, 0, 0, 1, -1)  # a prompt with two answers, one of them answered in turn
SPIED = []  # the layer, and [1, heads, T, d] of queries, keys and values, of each call of attention


def spy(module, query, key, value, mask, **arguments):
    SPIED.append((module.layer_idx, (query, key, value)))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **arguments)


AttentionInterface.register("spy", spy)
AttentionMaskInterface.register("spy", sdpa_mask)


def spied(model, ids, layer):
    """Queries, keys and values [T, heads, d] of transformers' own forward over one document."""
    SPIED.clear()
    model.set_attn_implementation("spy")
    try:
        model(ids[None], use_cache=False)
    finally:
        model.set_attn_implementation(attention.NAME)
    (inputs,) = [inputs for number, inputs in SPIED if number == layer]
    return [tensor[0].transpose(0, 1) for tensor in inputs]


@pytest.mark.parametrize("name", [name for name in MODELS if ordinary_attention(exact_model(name)) == "sdpa"])
def test_they_are_those_of_the_models_own_forward_packed_and_with_shared_prompts(name):
    model = exact_model(name)
    batch = continue_documents(random_batch(LENGTHS), LINKS)
    pieces = batch.input_ids.split(batch.lengths.tolist())
    with unrounded(), torch.no_grad():
        for layer, inputs in enumerate(ModelPolicy(model).attention_inputs(batch, [0, 1])):
            whole = [spied(model, torch.cat([pieces[d] for d in chain_of(LINKS, own)]), layer) for own in range(5)]
            for found, *separate in zip(inputs, *whole, strict=True):
                expected = [t[-length:] for t, length in zip(separate, LENGTHS, strict=True)]
                torch.testing.assert_close(found, torch.cat(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", APART)
def test_a_model_that_computes_attention_by_itself_is_refused_by_name(name):
    model = exact_model(name)
    with expect_error("part-unsupported", type(model).__name__):
        ModelPolicy(model).attention_inputs(random_batch((5, 3)), [0])


def test_a_layer_that_the_model_has_not_is_an_index_error():
    with pytest.raises(IndexError):
        ModelPolicy(exact_model("llama")).attention_inputs(random_batch((5, 3)), [2])


@pytest.mark.parametrize("first", ["states", "attention_inputs", "hidden"])
def test_they_are_of_the_pass_that_the_head_reads(first):
    model = tiny_model(attention_dropout=0.3)
    attention.install_attention(model)
    batch, policy = random_batch((8, 5)), ModelPolicy(model.train())
    torch.manual_seed(0)
    if first == "states":
        policy.states(batch)
    if first == "hidden":
        policy.hidden(batch, [0, 1])
    ((query, _, _),) = policy.attention_inputs(batch, [-1])
    after = torch.rand(1)
    torch.manual_seed(0)
    other = ModelPolicy(model)
    ((alone, _, _),) = other.attention_inputs(batch, [1])
    assert torch.equal(query, alone)
    assert torch.equal(policy.states(batch), other.states(batch))
    assert torch.equal(after, torch.rand(1))  # as many numbers were drawn as in one pass


def test_they_cost_one_pass_once_they_have_been_asked_for():
    policy, calls = ModelPolicy(exact_model("llama")), []
    run = policy.body.run
    policy.body.run = lambda *a, **k: calls.append("run") or run(*a, **k)
    for _ in range(2):
        batch = random_batch((8, 5))
        policy.forget()
        calls.clear()
        policy.token_logprobs(batch)
        policy.attention_inputs(batch, [0])
        policy.attention_inputs(batch, [-2])
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["PromptTuning", "PrefixTuning"])
def test_virtual_tokens_and_prefixes_are_left_out(name):
    import luthier_prompt
    from luthier_prompt.adapters import PrefixAdapter, PromptAdapter

    model, batch = exact_model("llama"), random_batch((8, 5))
    options = getattr(luthier_prompt, name)(num_virtual_tokens=3)
    adapter = (PromptAdapter if name == "PromptTuning" else PrefixAdapter)(options)
    with torch.no_grad():
        plain = ModelPolicy(model).attention_inputs(batch, [0])[0]
        policy = ModelPolicy(adapter.attach(model, context(model)), adapter)
        prompted = policy.attention_inputs(batch, [0])[0]
    assert [t.shape for t in prompted] == [t.shape for t in plain]
    torch.testing.assert_close(prompted[2], plain[2])  # values of the first layer know no position
    assert not torch.allclose(prompted[1], plain[1])  # keys know that they stand three places further on


def test_an_adapters_share_is_among_them():
    from luthier_lora import Lora
    from luthier_lora.adapter import LoraAdapter

    model, batch = exact_model("llama"), random_batch((8, 5))
    with torch.no_grad():
        plain = ModelPolicy(model).attention_inputs(batch, [0])[0]
        adapter = LoraAdapter(Lora(r=2, target_modules=["q_proj"], init_lora_weights=False))
        found = ModelPolicy(adapter.attach(model, context(model)), adapter).attention_inputs(batch, [0])[0]
    changed = [not torch.allclose(one, other) for one, other in zip(plain, found, strict=True)]
    assert changed == [True, False, False]


@pytest.mark.parametrize("mode", [True, "selective"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_through_them_are_those_of_a_plain_pass_to_the_bit_where_layers_are_computed_again(
    architecture, mode
):
    def gradients(mode):
        model = tiny_model(architecture)
        attention.install_attention(model)
        adapter = FullTuning(NoOptions())
        model = adapter.attach(model, context(model)).train()
        policy, batch = ModelPolicy(model, adapter), random_batch((9, 5))
        torch.manual_seed(5)
        with recompute.install_recompute(model, mode):
            inputs = policy.attention_inputs(batch, [0, 1])
            total = sum(tensor.square().sum() for layer in inputs for tensor in layer)
            (total + policy.token_logprobs(batch).sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(mode)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
