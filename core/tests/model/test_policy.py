"""The policy's head: chunks, gradients, statistics, the reference, and the experts' balance."""

from contextlib import contextmanager, nullcontext

import attrs
import luthier.model.policy as policy_module
import pytest
import torch
from luthier.errors import LuthierError
from luthier.model.attention import install_attention
from luthier.model.policy import ModelPolicy
from luthier.step.module import router_balance
from luthier.testing.worlds import random_batch, tiny_model


@pytest.fixture
def model():
    made = tiny_model().double()
    install_attention(made)
    return made


def full_logits(policy, batch):
    """[S, V] and labels [S] at the supervised positions, all at once."""
    states = policy.hidden(batch, (-1,))[0][batch.previous[batch.supervised]]
    return policy.model.lm_head(states), batch.labels[batch.supervised]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_chunks_of_the_head_change_neither_value_nor_gradient(model, chunk, monkeypatch):
    monkeypatch.setattr(policy_module, "CHUNK", chunk * model.config.vocab_size)
    batch, policy = random_batch((8, 5, 4)), ModelPolicy(model)
    found = policy.token_logprobs(batch)
    (found * torch.arange(len(found))).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    policy.forget()
    logits, labels = full_logits(policy, batch)
    expected = torch.zeros(batch.num_tokens, dtype=torch.float64)
    expected[batch.supervised] = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (expected * torch.arange(len(found))).sum().backward()
    for mine, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-9, atol=1e-11)


def test_entropy_and_top1_come_from_the_same_pass(model):
    batch, policy = random_batch((8, 5)), ModelPolicy(model)
    _, also = policy.token_logprobs(batch, want=("entropy", "top1"))
    logits, labels = full_logits(policy, batch)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(also["entropy"][batch.supervised], expected)
    assert torch.equal(also["top1"][batch.supervised].bool(), logits.argmax(-1) == labels)


def test_map_logits_gives_a_function_each_positions_own_values(model):
    batch, policy = random_batch((8, 5)), ModelPolicy(model)
    weights = torch.rand(batch.num_tokens, dtype=torch.float64)
    found = policy.map_logits(batch, lambda logits, labels, w: logits.logsumexp(-1) * w, weights)
    logits, _ = full_logits(policy, batch)
    expected = torch.zeros_like(found)
    expected[batch.supervised] = logits.logsumexp(-1) * weights[batch.supervised]
    torch.testing.assert_close(found, expected)


def test_the_body_runs_once_however_much_is_asked(model):
    batch, policy, calls = random_batch((8, 5)), ModelPolicy(model), []
    policy.body.module.register_forward_pre_hook(lambda *_: calls.append(1), with_kwargs=False)
    run = policy.body.run
    policy.body.run = lambda *a, **k: calls.append("run") or run(*a, **k)
    policy.token_logprobs(batch)
    policy.hidden(batch, (-1,))
    policy.token_logprobs(batch, want=("entropy",))
    policy.token_logprobs(batch, labels=batch.labels.flip(0))
    policy.head(policy.states(batch)[:2])
    policy.map_logits(batch, lambda logits, labels: logits.logsumexp(-1))
    assert calls.count("run") == 1


def test_other_labels_are_scored_as_if_they_were_the_batchs_own(model):
    batch, policy = random_batch((8, 5)), ModelPolicy(model)
    labels = torch.where(torch.rand(batch.num_tokens) < 0.5, torch.randint(0, 32, (batch.num_tokens,)), -100)
    expected = ModelPolicy(model).token_logprobs(attrs.evolve(batch, labels=labels))
    found = policy.token_logprobs(batch, labels=labels)
    assert torch.equal(found, expected) and (found[labels == -100] == 0).all()
    assert not torch.equal(found, policy.token_logprobs(batch))


def test_the_head_over_states_gives_the_logits_of_map_logits(model):
    batch, policy = random_batch((8, 5)), ModelPolicy(model)
    positions = batch.supervised
    logits = policy.head(policy.states(batch)[batch.previous[positions]])
    assert torch.equal(policy.map_logits(batch, lambda values, labels: values)[positions], logits)


def test_a_head_answers_before_the_body_has_run(model):
    states = torch.rand(3, model.config.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(ModelPolicy(model).head(states), model.lm_head(states))


@pytest.mark.parametrize("first", ["states", "hidden"])
def test_hidden_states_are_those_of_the_pass_that_the_head_reads(first):
    model = tiny_model(attention_dropout=0.3)
    install_attention(model)
    batch, policy = random_batch((8, 5)), ModelPolicy(model)
    torch.manual_seed(0)
    if first == "states":
        before = policy.states(batch)
    layers = policy.hidden(batch, (0, 1, -1))
    after = torch.rand(1)
    torch.manual_seed(0)
    alone = ModelPolicy(model).states(batch)
    assert torch.equal(layers[-1], alone) and torch.equal(policy.states(batch), alone)
    assert first == "hidden" or torch.equal(before, alone)
    assert torch.equal(after, torch.rand(1))  # as many numbers were drawn as in one pass


def test_hidden_states_cost_one_pass_once_they_have_been_asked_for(model):
    policy, calls = ModelPolicy(model), []
    run = policy.body.run
    policy.body.run = lambda *a, **k: calls.append("run") or run(*a, **k)
    for lengths in ((8, 5), (4, 4)):
        batch = random_batch(lengths)
        policy.forget()
        calls.clear()
        policy.token_logprobs(batch)
        policy.hidden(batch, (1, -1))
    assert len(calls) == 1


def test_another_model_meets_the_policy_chunk_by_chunk(model):
    batch, other = random_batch((8, 5)), tiny_model(seed=7, hidden_size=64).double()
    install_attention(other)
    teacher = ModelPolicy(other, frozen=nullcontext)
    found = ModelPolicy(model).map_logits(batch, lambda mine, labels, theirs: theirs.logsumexp(-1), other=teacher)
    states = ModelPolicy(other).states(batch)[batch.previous[batch.supervised]]
    torch.testing.assert_close(found[batch.supervised], other.lm_head(states).logsumexp(-1))
    assert not found.requires_grad


class Doubling:
    """An adapter that doubles the embeddings, so that disabled and enabled differ."""

    def __init__(self, model):
        self.layer = model.get_input_embeddings()
        self.on = True
        self.layer.register_forward_hook(lambda m, i, o: o * 2 if self.on else o)

    @contextmanager
    def disabled(self):
        self.on = False
        yield
        self.on = True


def test_the_reference_is_the_policy_without_adapter_gradient_and_dropout():
    model = tiny_model()
    install_attention(model)
    batch = random_batch((8, 5))
    base = ModelPolicy(model).token_logprobs(batch).detach()
    policy = ModelPolicy(model, Doubling(model))
    reference = policy.without_adapter().token_logprobs(batch)
    torch.testing.assert_close(reference, base)
    assert not reference.requires_grad
    assert not torch.allclose(policy.token_logprobs(batch), base)
    assert model.training


def test_two_policies_meet_chunk_by_chunk_for_a_divergence(model):
    batch, policy = random_batch((8, 5)), ModelPolicy(model, Doubling(model))

    def divergence(mine, labels, theirs):
        return (mine.softmax(-1) * (mine.log_softmax(-1) - theirs.log_softmax(-1))).sum(-1)

    found = policy.map_logits(batch, divergence, other=policy.without_adapter())
    assert (found[batch.supervised] > 0).all()
    found.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_what_a_policy_cannot_give_is_refused_by_name(model):
    batch, policy = random_batch((8, 5)), ModelPolicy(model)
    for ask in (policy.reference, policy.teacher, lambda: policy.score(batch)):
        with pytest.raises(LuthierError) as caught:
            ask()
        assert caught.value.code == "part-unsupported"
    with pytest.raises(LuthierError, match="nonsense"):
        policy.token_logprobs(batch, want=("nonsense",))


def test_the_experts_balance_of_one_document_is_transformers_own():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    batch = random_batch((11,))
    routers = tuple(torch.randn(11, 4) for _ in range(3))
    expected = load_balancing_loss_func(routers, num_experts=4, top_k=2)
    torch.testing.assert_close(router_balance(routers, 2, batch)[0], expected)
