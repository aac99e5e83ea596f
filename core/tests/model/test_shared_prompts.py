"""Documents that continue another: as exact as separate ones that repeat it, in values and gradients."""

import attrs
import pytest
import torch
from exact_models import APART, MODELS, exact_model, stand_in_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.data.batches.batch import chain_of, collate_examples, continue_documents
from luthier.data.examples import TokenExample
from luthier.model import self_check as probe
from luthier.model.attention import ways
from luthier.model.attention.document_masks import cut_documents
from luthier.model.attention.plain import attend_singly
from luthier.model.attention.score_blocks import Rule
from luthier.model.attention.varlen import Kernel, attend_at_once
from luthier.model.policy import ModelPolicy
from luthier.step.module import router_balance
from luthier.testing.exactness import unrounded
from luthier.testing.worlds import random_batch, tiny_model

LENGTHS, LINKS = (7, 4, 6, 3, 9, 5), (-1, 0, 0, 1, -1, 0)  # a prompt with three answers, one of them answered in turn


def shared_batch(lengths=LENGTHS, links=LINKS):
    """Every label counted, also the first of a document that continues another."""
    batch = random_batch(lengths, supervised=1.0)
    return continue_documents(attrs.evolve(batch, labels=batch.input_ids), links)


def separate(batch, compute, links=LINKS):
    """[T] of `compute` over each document alone, after what it continues."""
    pieces, found = batch.input_ids.split(batch.lengths.tolist()), []
    for document, own in enumerate(pieces):
        ids = torch.cat([pieces[d] for d in chain_of(links, document)]).numpy()
        found.append(compute(collate_examples([TokenExample(input_ids=ids, labels=ids)]))[-len(own) :])
    return torch.cat(found)


def differentiated(model, compute):
    """Values, and the gradient of every parameter, of a weighted sum of [T] values."""
    found = compute()
    weights = torch.rand(len(found), dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found.detach(), gradients


@pytest.mark.parametrize("name", [*MODELS, *APART])
def test_shared_prompts_equal_separate_documents_in_values_and_gradients(name):
    model, batch = exact_model(name), shared_batch()
    with unrounded():
        found, own = differentiated(model, lambda: ModelPolicy(model).token_logprobs(batch))
        expected, theirs = differentiated(
            model, lambda: separate(batch, lambda part: ModelPolicy(model).token_logprobs(part))
        )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "stablelm", "nemotron", "mixtral"])
@pytest.mark.parametrize("mode", [True, "selective"])
def test_a_shared_prompt_is_recomputed_in_backward(name, mode):
    from luthier.model import recompute

    model, batch = exact_model(name).train(), shared_batch()
    expected = differentiated(model, lambda: ModelPolicy(model).token_logprobs(batch))[1]
    with recompute.install_recompute(model, mode):
        found = differentiated(model, lambda: ModelPolicy(model).token_logprobs(batch))[1]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 9), max_size=4)), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 3, 20]),
    cap=st.sampled_from([None, 2.0]),
    way=st.sampled_from(["products", "singly", "kernel"]),
)
def test_every_way_attends_along_continuations_as_repeated_prompts_would(prompts, window, cap, way):
    lengths = [length for prompt, answers in prompts for length in (prompt, *answers)]
    links = [link for i, (_, answers) in enumerate(prompts) for link in (-1, *[sum(1 + len(a) for _, a in prompts[:i])] * len(answers))]  # fmt: skip
    rule, starts = Rule(scale=0.5, window=window, cap=cap), (0, *torch.tensor(lengths).cumsum(0).tolist())
    random = torch.Generator().manual_seed(sum(lengths))
    q, k, v = (torch.randn(1, h, starts[-1], 8, dtype=torch.float64, generator=random) for h in (4, 2, 2))
    found = attended(way, q, k, v, cut_documents(starts, tuple(links)), rule)
    expected = []
    for document in range(len(lengths)):
        tokens = torch.cat([torch.arange(starts[d], starts[d + 1]) for d in chain_of(links, document)])
        alone = cut_documents((0, len(tokens)), None)
        expected.append(attend_singly(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], alone, rule)[:, -lengths[document] :])  # fmt: skip
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-10, atol=1e-10)


def attended(way, q, k, v, found, rule):
    if way == "singly":
        return attend_singly(q, k, v, found, rule)
    if way == "kernel":
        kernel = Kernel.of(stand_in_kernel)
        return attend_at_once(kernel, kernel.arguments(rule, 0.0, grouped=True), q, k, v, found)
    return ways._by(ways.Choice("products"), (q, k, v), found, rule, 0.0)


def test_the_probe_tries_shared_prompts_and_finds_positions_that_do_not_count_on():
    model = exact_model("llama")
    assert probe.find_disagreement(model) is None
    batch = probe.make_documents(model)
    alone = torch.cat([torch.arange(length) for length in batch.lengths])
    assert not torch.equal(alone, batch.position_ids)
    broken = attrs.evolve(batch, position_ids=alone)
    assert "packed documents differ from separate ones" in probe.find_disagreement(model, batch=broken)


def test_the_balance_of_experts_counts_a_shared_prompt_once():
    model = tiny_model("mixtral").eval()
    from luthier.model.attention import install_attention

    install_attention(model)
    batch, policy = shared_batch((9, 4, 5), (-1, 0, 0)), ModelPolicy(model)
    policy.want_routers = True
    routers = policy.router_logits(batch)
    assert [len(r) for r in routers] == [18, 18]
    balance = router_balance(routers, 2, batch)
    alone = ModelPolicy(model)
    alone.want_routers = True
    prompt = collate_examples([TokenExample(input_ids=batch.input_ids[:9].numpy(), labels=batch.input_ids[:9].numpy())])
    torch.testing.assert_close(balance[0], router_balance(alone.router_logits(prompt), 2, prompt)[0])
    assert balance.shape == (3,) and int(batch.lengths.sum()) == batch.num_tokens


def test_labels_at_the_start_of_a_continuation_are_predicted_by_the_prompts_last_token():
    batch = shared_batch((3, 2, 2), (-1, 0, 0))
    assert batch.previous.tolist() == [-1, 0, 1, 2, 3, 2, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert batch.supervised.tolist() == [1, 2, 3, 4, 5, 6]
