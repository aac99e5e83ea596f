"""Attention relations: values and gradients of a plain formula in float64, whatever models, blocks and prompts."""

from contextlib import nullcontext

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.batches.batch import continue_documents
from luthier.model.attention import install_attention
from luthier.model.policy import ModelPolicy
from luthier.testing import expect_error
from luthier.testing.exactness import unrounded
from luthier.testing.worlds import random_batch, tiny_model
from luthier_distill import Distill, attention_relations
from luthier_distill.attention_relations import sum_attention
from luthier_distill.plain import sum_plain_relations

LENGTHS, LINKS = (7, 4, 6, 3, 5), (-1, 0, 0, 1, -1)  # a prompt with two answers, one of them answered in turn
TEACHERS = {  # other widths, depths and heads, and fused projections
    "llama": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4},
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 48, "n_head": 6},
    "gpt_neox": {},
}
KINDS = ("query", "key", "value", "query_key")


def made(architecture="llama", seed=0, **changes):
    model = tiny_model(architecture, seed=seed, **changes).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
    install_attention(model)
    return model


def paired(own, teacher):
    policy = ModelPolicy(own)
    policy.others["teacher"] = ModelPolicy(teacher, frozen=nullcontext)
    return policy


def drawn(lengths=LENGTHS, links=LINKS, seed=0):
    batch = continue_documents(random_batch(lengths, seed=seed), links)
    weights = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(seed))
    return attrs.evolve(batch, token_weights=weights)


def differentiated(function, options, model, teacher, batch):
    total = function(options, paired(model, teacher), batch)
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return total.detach(), gradients


@pytest.mark.parametrize(
    ("name", "block"), [("llama", 1), ("llama", 1 << 22), ("phi3", 40), ("gpt2", 40), ("gpt_neox", 1 << 22)]
)
def test_sum_and_gradients_are_those_of_the_plain_formula(name, block, monkeypatch):
    monkeypatch.setattr(attention_relations, "BLOCK", block)
    options = Distill(attention_weight=1.0, attention_relations=list(KINDS), attention_layers=[0, -1],
                      teacher_attention_layers=[-1, 1])  # fmt: skip
    model, teacher, batch = made(seed=1), made(name, seed=2, **TEACHERS[name]), drawn()
    with unrounded():
        found, own = differentiated(sum_attention, options, model, teacher, batch)
        expected, theirs = differentiated(sum_plain_relations, options, model, teacher, batch)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert float(found) > 0.01
    assert own.keys() == theirs.keys()
    for key in own:
        torch.testing.assert_close(own[key], theirs[key], rtol=1e-9, atol=1e-11)


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    heads=st.sampled_from((1, 2, 8)),
)
def test_it_adds_up_over_any_split_of_the_documents(lengths, seed, heads):
    options = Distill(attention_weight=1.0, relation_heads=heads)
    policy = paired(made(), made(seed=3))
    batch = drawn(lengths, [-1] * len(lengths), seed)
    with unrounded(), torch.no_grad():
        together = sum_attention(options, policy, batch)
        policy.forget()
        apart = []
        for number, (start, stop) in enumerate(zip(batch.document_starts[:-1], batch.document_starts[1:], strict=True)):
            own = random_batch([int(stop - start)])
            names = ("input_ids", "labels", "token_weights")
            part = attrs.evolve(own, **{name: getattr(batch, name)[start:stop] for name in names})
            policy.forget()
            apart.append(sum_attention(options, policy, part))
    torch.testing.assert_close(together, torch.stack(apart).sum(), rtol=1e-10, atol=1e-12)


def test_the_relation_of_queries_and_keys_is_the_models_attention():
    model, teacher = made(seed=1), made(seed=2, hidden_size=64)  # both with 4 heads
    batch = drawn((9,), (-1,))
    with unrounded(), torch.no_grad():
        options = Distill(attention_weight=1.0, attention_relations=["query_key"], relation_heads=4)
        found = sum_attention(options, paired(model, teacher), batch)
        maps = []
        for one in (model, teacher):
            one.set_attn_implementation("eager")
            maps.append(one(batch.input_ids[None], output_attentions=True, use_cache=False).attentions[-1][0])
    student, wanted = maps  # [heads, T, T]
    divergence = torch.nn.functional.kl_div(student.log(), wanted, reduction="none").nan_to_num().sum(-1).mean(0)
    sources, weights = batch.previous[batch.supervised], batch.token_weights[batch.supervised]
    torch.testing.assert_close(found, (divergence[sources] * weights).sum(), rtol=1e-10, atol=1e-12)


def test_a_model_like_its_teacher_costs_nothing_and_another_one_is_pulled_towards_it():
    options, batch = Distill(attention_weight=1.0), drawn()
    teacher = made(seed=2)
    same, _ = differentiated(sum_attention, options, made(seed=2), teacher, batch)
    assert float(same) == pytest.approx(0.0, abs=1e-12)
    model = made(seed=1)
    before, gradients = differentiated(sum_attention, options, model, teacher, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter.sub_(1e-5 * gradients[name])
    after, _ = differentiated(sum_attention, options, model, teacher, batch)
    assert 0 < float(after) < float(before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_each_relation_reads_its_own_projections(kind):
    options = Distill(attention_weight=1.0, attention_relations=[kind])
    _, gradients = differentiated(sum_attention, options, made(seed=1), made(seed=2), drawn())
    reached = {name.split(".")[-2][0] for name in gradients if "layers.1.self_attn" in name and gradients[name].any()}
    assert reached == {"query": {"q"}, "key": {"k"}, "value": {"v"}, "query_key": {"q", "k"}}[kind]


def test_relations_of_a_long_document_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(attention_relations, "BLOCK", 1 << 12)
    policy, batch, held = paired(made(seed=1), made(seed=2)), drawn((300, 40), (-1, -1)), []

    def pack(tensor):
        held.append(tensor.numel())
        return tensor

    policy.attention_inputs(batch, [-1])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sum_attention(Distill(attention_weight=1.0), policy, batch)
    assert max(held) <= 340 * 32  # what the relations are made of; 2 heads have 2 * 300 * 300 relations


def test_relations_are_those_of_float32_where_products_are_in_bfloat16():
    options, batch = Distill(attention_weight=1.0), drawn()
    policy = paired(made(seed=1).float(), made(seed=2).float())
    expected = sum_attention(options, policy, batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sum_attention(options, policy, batch), expected)


def test_no_label_gives_a_zero_that_reaches_every_layer_below():
    batch = drawn()
    mute = attrs.evolve(batch, labels=torch.full_like(batch.labels, -100))
    total, gradients = differentiated(sum_attention, Distill(attention_weight=1.0), made(), made(seed=2), mute)
    assert float(total) == 0.0
    assert {"model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"} <= gradients.keys()
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("given_options", "field"),
    [
        ({"attention_relations": ["query"]}, "attention_relations"),
        ({"relation_heads": 2}, "relation_heads"),
        ({"attention_layers": [1]}, "attention_layers"),
        ({"teacher_attention_layers": [1]}, "teacher_attention_layers"),
        ({"attention_weight": 1.0, "attention_relations": []}, "attention_relations"),
        ({"attention_weight": 1.0, "attention_relations": ["key", "key"]}, "attention_relations"),
        (
            {"attention_weight": 1.0, "attention_layers": [0, 1], "teacher_attention_layers": [1]},
            "teacher_attention_layers",
        ),
        ({"attention_weight": 1.0, "attention_layers": []}, "teacher_attention_layers"),
    ],
)
def test_options_that_would_do_nothing_or_do_not_match_are_refused(given_options, field):
    with expect_error("recipe-conflict", f"Distill.{field}"):
        Distill(**given_options)


def test_relation_heads_that_do_not_divide_every_width_are_refused():
    with expect_error("recipe-out-of-range", "loss.relation_heads", "teacher"):
        sum_attention(Distill(attention_weight=1.0, relation_heads=8), paired(made(), made("gpt2", n_embd=36)), drawn())


@pytest.mark.parametrize("field", ["attention_layers", "teacher_attention_layers"])
def test_a_layer_that_a_model_has_not_is_refused(field):
    layers = {"attention_layers": [0], "teacher_attention_layers": [0], field: [2]}
    with pytest.raises(LuthierError) as caught:
        sum_attention(Distill(attention_weight=1.0, **layers), paired(made(), made(seed=2)), drawn())
    assert (caught.value.code, caught.value.where) == ("recipe-out-of-range", f"loss.{field}")
    assert "2 layers" in caught.value.problem
