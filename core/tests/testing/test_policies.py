"""The table policy gives what a model with these logits gives, through the engine's own policy too."""

from __future__ import annotations

import pytest
import torch
from luthier.model import attention
from luthier.model.policy import ModelPolicy
from luthier.plugins.contracts.policy_protocol import Policy
from luthier.testing import expect_error
from luthier.testing.policies import TablePolicy, random_table
from luthier.testing.worlds import VOCABULARY, random_batch, tiny_model


@pytest.fixture(scope="module")
def twins():
    """A model's policy, and the table of the logits that it gives at each token."""
    model = tiny_model().eval()
    attention.install_attention(model)
    batch = random_batch(supervised=0.6, seed=3)
    told = attention.document_arguments(batch)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, **told)
    return ModelPolicy(model), TablePolicy(logits.logits[0].detach().requires_grad_(True)), batch


def test_it_keeps_the_protocol():
    assert isinstance(TablePolicy(torch.zeros(3, 5)), Policy)


def test_log_probabilities_and_wants_are_those_of_the_engines_policy(twins):
    model, table, batch = twins
    found, also = table.token_logprobs(batch, want=("entropy", "top1"))
    expected, wanted = model.token_logprobs(batch, want=("entropy", "top1"))
    torch.testing.assert_close(found, expected)
    for name in wanted:
        torch.testing.assert_close(also[name], wanted[name])


def test_mapped_logits_are_those_of_the_engines_policy(twins):
    model, table, batch = twins
    weights = torch.arange(batch.num_tokens, dtype=torch.float32)

    def largest(logits, labels, given):
        return torch.stack([logits.amax(-1) * given, labels.float()], -1)

    torch.testing.assert_close(
        table.map_logits(batch, largest, weights), model.map_logits(batch, largest, weights), rtol=1e-5, atol=1e-5
    )


def test_another_policys_logits_come_last():
    batch = random_batch(seed=1)
    one, two = (TablePolicy(random_table(batch.num_tokens, VOCABULARY, seed)) for seed in (0, 1))
    found = one.map_logits(batch, lambda logits, labels, other: (logits - other).sum(-1), other=two)
    rows = batch.previous[batch.supervised]
    torch.testing.assert_close(found[batch.supervised], (one.logits - two.logits)[rows].sum(-1))


def test_only_rows_that_predict_a_label_get_a_gradient():
    batch = random_batch(supervised=0.3, seed=5)
    table = random_table(batch.num_tokens, VOCABULARY, 0).requires_grad_(True)
    TablePolicy(table).token_logprobs(batch).sum().backward()
    reached = table.grad.abs().sum(-1) > 0
    assert reached.nonzero().squeeze(1).tolist() == sorted(batch.previous[batch.supervised].tolist())


def test_a_batch_without_labels_gives_zeros():
    batch = random_batch(seed=2)
    batch.labels[:] = -100
    policy = TablePolicy(random_table(batch.num_tokens, VOCABULARY, 0))
    assert not policy.token_logprobs(batch).any()
    assert not policy.map_logits(batch, lambda logits, labels: logits).any()


def test_reference_and_teacher_differ_from_the_policy_and_have_no_gradient():
    batch = random_batch(seed=2)
    policy = TablePolicy(random_table(batch.num_tokens, VOCABULARY, 0).requires_grad_(True))
    own = policy.token_logprobs(batch)
    for other in (policy.reference(), policy.teacher()):
        found = other.token_logprobs(batch)
        assert not found.requires_grad
        assert not torch.allclose(found, own.detach())


def test_hidden_states_and_scores_have_their_shapes_and_a_gradient():
    batch = random_batch((4, 6), seed=2)
    policy = TablePolicy(random_table(batch.num_tokens, VOCABULARY, 0).requires_grad_(True))
    first, last = policy.hidden(batch, [0, -1])
    assert first.shape == last.shape == (10, 8)
    assert not first.equal(last)
    assert policy.score(batch).shape == (2,)
    assert policy.score(batch).requires_grad


def test_an_unknown_want_is_refused():
    with expect_error("part-invalid"):
        TablePolicy(torch.zeros(3, 5)).token_logprobs(random_batch((3,)), want=("margin",))
