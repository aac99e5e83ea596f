"""InfoNCE is its closed form in float64, conforms, and refuses rows that lack a text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.plugins.completion import add_defaults
from luthier.testing import conformance
from luthier.testing.drawn_units import DrawnUnit, lay_out_units, pack_examples
from luthier.testing.policies import TablePolicy
from luthier.testing.strategies import Document
from luthier_contrastive import Infonce, InfonceHard, luthier_losses
from luthier_contrastive.loss import NAMES, InfonceLoss

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 1 << 16)
WIDTH = 8


@conformance(luthier_losses(), examples=[Infonce(symmetric=True), InfonceHard(pooling="last")], vary=False)
def test_infonce_conforms(check):
    check()


def drawn(loss, seed, count, names):
    chance = torch.Generator().manual_seed(seed)

    def text():
        length = int(torch.randint(1, 5, (), generator=chance))
        ids = tuple(torch.randint(0, WIDTH, (length,), generator=chance).tolist())
        return Document(ids=ids, supervised=(True,) * length)

    units = [DrawnUnit(documents={name: text() for name in names}) for _ in range(count)]
    batch = pack_examples(lay_out_units(loss, units))
    return batch, torch.randn(batch.num_tokens, WIDTH, generator=chance, dtype=torch.float64)


def closed_form(options, batch, logits, names):
    """The mean cost, from probabilities of one text at a time."""
    (states,) = TablePolicy(logits).hidden(batch, [-1])
    starts = batch.document_starts.tolist()
    texts = [states[a:b].mean(0) if options.pooling == "mean" else states[b - 1] for a, b in zip(starts, starts[1:])]
    texts = [text / text.norm() for text in texts]
    sides = {name: [texts[d] for d in batch.documents(name).tolist()] for name in names}
    targets = [text for name in names[1:] for text in sides[name]]

    def cost(text, own, others):
        exps = [((text @ other) / options.temperature).exp() for other in others]
        return -(exps[own] / sum(exps)).log()

    count = batch.num_units
    there = sum(cost(q, i, targets) for i, q in enumerate(sides["query"])) / count
    if not options.symmetric:
        return there
    back = sum(cost(p, i, sides["query"]) for i, p in enumerate(sides["passage"])) / count
    return (there + back) / 2


@pytest.mark.parametrize("names", [NAMES[:2], NAMES], ids=["pairs", "hard"])
@few
@given(seed=seeds, count=st.integers(1, 4), temperature=st.sampled_from((0.05, 1.0)), symmetric=st.booleans(),
       pooling=st.sampled_from(("mean", "last")))  # fmt: skip
def test_infonce_is_its_closed_form(names, seed, count, temperature, symmetric, pooling):
    options = Infonce(temperature=temperature, symmetric=symmetric, pooling=pooling)
    loss = add_defaults(InfonceLoss(options), "loss")
    batch, logits = drawn(loss, seed, count, names)
    ours, theirs = logits.clone().requires_grad_(True), logits.clone().requires_grad_(True)
    found = loss(TablePolicy(ours), batch).sums["infonce"] / loss.terms(batch)["infonce"]
    expected = closed_form(options, batch, theirs, names)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)


@few
@given(seed=seeds)
def test_a_symmetric_cost_is_the_same_with_query_and_passage_exchanged(seed):
    loss = add_defaults(InfonceLoss(Infonce(symmetric=True)), "loss")
    batch, logits = drawn(loss, seed, 3, NAMES[:2])
    scores, fixed = loss.scores(TablePolicy(logits), batch)
    straight, turned = (loss.combine(s, fixed).sums["infonce"] for s in (scores, scores.flip(1)))
    torch.testing.assert_close(straight, turned)


def test_the_share_found_counts_queries_whose_passage_is_nearest():
    loss = add_defaults(InfonceLoss(Infonce()), "loss")
    sides = torch.eye(3, dtype=torch.float64)
    scores = torch.stack([sides, sides[[0, 2, 1]]], dim=1)
    metrics = loss.combine(scores, {}).metrics
    assert tuple(map(float, metrics["found"])) == (1.0, 3.0)
    assert tuple(map(float, metrics["cosine"])) == (1.0, 3.0)
