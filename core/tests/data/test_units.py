"""Units as losses arrange them and as they are laid out: prompts shared, nothing lost, nothing divided."""

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError, Passage
from luthier.data.batches.batch import chain_of, collate_examples
from luthier.data.batches.layout import UnitLayout
from luthier.data.batches.packing import Packing
from luthier.data.batches.shared_prompts import count_saved, share_prompts
from luthier.data.examples import IGNORED, TokenDataset, TokenExample

TOKENS = st.integers(0, 2)
PROMPTS = st.lists(st.lists(TOKENS, max_size=5), min_size=1, max_size=2)
ANSWERS = st.lists(st.tuples(st.integers(0, 1), st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=5)


def document(prompt, answer):
    ids = np.array([*prompt, *answer], np.int32)
    return TokenExample(
        input_ids=ids, labels=np.where(np.arange(len(ids)) < len(prompt), IGNORED, ids).astype(np.int32)
    )


def unit(prompts, answers, index=0, **columns):
    documents = {f"d{i}": document(prompts[which % len(prompts)], answer) for i, (which, answer) in enumerate(answers)}
    return attrs.evolve(TokenExample.joined(documents), index=index, columns=columns)


units = st.builds(unit, PROMPTS, ANSWERS)


def read(batch):
    """Each named document's unit, name, tokens with what it continues, positions, and (token, label) of what counts."""
    starts, links = batch.document_starts.tolist(), batch.continues.tolist()
    found = []
    for name, numbers in batch.named.items():
        for number in numbers[numbers >= 0].tolist():
            spans = [range(starts[d], starts[d + 1]) for d in chain_of(links, number)]
            at = [t for span in spans for t in span]
            labels = [(int(batch.input_ids[batch.previous[t]]), int(batch.labels[t])) for t in spans[-1]
                      if t in batch.supervised.tolist()]  # fmt: skip
            assert [int(batch.previous[b]) for b in at[1:]] == at[:-1] and int(batch.previous[at[0]]) == -1
            assert batch.position_ids[at].tolist() == list(range(len(at)))
            found.append((int(batch.unit_of[number]), name, batch.input_ids[at].tolist(), labels))
    return sorted(found)


@settings(deadline=None)
@given(st.lists(units, min_size=1, max_size=4))
def test_shared_prompts_leave_every_document_its_tokens_positions_and_labels(drawn):
    plain, shared = collate_examples(drawn), collate_examples([share_prompts(one) for one in drawn])
    assert read(plain) == read(shared)
    assert plain.num_tokens - shared.num_tokens == count_saved(drawn).sum()
    assert len(plain.supervised) == len(shared.supervised) == sum(share_prompts(one).num_supervised for one in drawn)
    for batch in (plain, shared):
        assert batch.unit_of.tolist() == sorted(batch.unit_of.tolist()) and batch.num_units == len(drawn)


@given(st.lists(TOKENS, min_size=1, max_size=9), st.integers(2, 6))
def test_one_prompt_of_k_completions_is_computed_once(prompt, count):
    group = unit([prompt], [(0, [i % 3, 1]) for i in range(count)])
    shared = share_prompts(group)
    assert len(shared.input_ids) == len(prompt) + 2 * count
    assert shared.continues == (-1, *[0] * count) and shared.names == ("", *group.names)


def test_a_document_of_which_all_is_supervised_shares_nothing():
    whole = unit([[]], [(0, [1, 2, 1]), (0, [1, 2, 2])])
    assert share_prompts(whole) is whole


@settings(deadline=None)
@given(st.lists(units, min_size=1, max_size=9), st.integers(4, 40), st.integers(1, 3), st.booleans())
def test_no_unit_is_ever_divided(drawn, limit, ranks, on):
    drawn = [share_prompts(attrs.evolve(one, index=i)) for i, one in enumerate(drawn)]
    packing = Packing(max_tokens=limit, on=on, ranks=ranks)
    seen = []
    for bins in packing.spread(packing.sizes(drawn)):
        for own in filter(None, bins):
            batch = collate_examples([drawn[i] for i in own])
            assert on or batch.num_units == 1
            assert batch.num_tokens <= max(limit, *packing.sizes(drawn))
            for number, index in enumerate(batch.index.tolist()):
                documents = [int(d) for d in (batch.unit_of == number).nonzero()]
                assert len(documents) == len(drawn[index].starts)
            seen += batch.index.tolist()
    assert sorted(seen) == list(range(len(drawn)))


def mismatched(units):
    """Each prompt with the answer of the unit after it, as KTO's estimate of its KL divergence has them."""
    answers = [one.documents["text"].answer for one in units]
    turned = answers[1:] + answers[:1]
    return [
        one.with_document("mismatched", one.documents["text"].prompt + answer)
        for one, answer in zip(units, turned, strict=True)
    ]


def judged(count):
    return [attrs.evolve(document([1, 2, i], [7, i, 9]), index=i, columns={"label": True}) for i in range(count)]


def test_a_loss_adds_documents_that_share_the_prompt_of_their_unit():
    laid = UnitLayout(max_length=6, arrange=mismatched, shares_prompts=True).lay_out(judged(3))
    assert (laid.derived, laid.cut) == (3, 0)
    batch = collate_examples(laid.examples)
    texts = {(name, i): tokens for i, name, tokens, _ in read(batch)}
    assert texts["mismatched", 0] == [1, 2, 0, 7, 1, 9] and texts["mismatched", 2] == [1, 2, 2, 7, 0, 9]
    assert texts["text", 1] == [1, 2, 1, 7, 1, 9] and batch.columns["label"].tolist() == [True] * 3
    assert batch.num_tokens == 3 * (3 + 3 + 3)


def test_a_derived_document_above_max_length_loses_the_end_of_its_answer_and_is_counted():
    laid = UnitLayout(max_length=5, arrange=mismatched, shares_prompts=False).lay_out(judged(3))
    assert (laid.derived, laid.cut) == (3, 3)
    assert [e.by_name()["mismatched"].input_ids.tolist() for e in laid.examples][0] == [1, 2, 0, 7, 1]


@given(st.integers(1, 9), st.integers(1, 12), st.booleans())
def test_the_worst_case_of_a_unit_is_never_exceeded(count, max_length, shares):
    rows = [one for one in judged(count) if one.longest <= max_length]
    if rows:
        layout, dataset = (
            UnitLayout(max_length=max_length, arrange=mismatched, shares_prompts=shares),
            TokenDataset.of(rows),
        )
        laid = layout.lay_out(rows).examples
        assert all(len(e.input_ids) <= most for e, most in zip(laid, layout.unit_tokens(dataset).tolist(), strict=True))
        assert max(len(e.input_ids) for e in laid) <= layout.longest_unit(dataset)


BAD = {
    "drops a unit": lambda units: units[1:],
    "reorders units": lambda units: units[::-1],
    "doubles a unit": lambda units: [*units, units[0]],
    "changes a document": lambda units: [
        attrs.evolve(u, documents={"text": u.documents["text"].prompt}) for u in units
    ],
    "adds nothing": lambda units: [u.with_document("none", u.documents["text"].cut(0, 0)) for u in units],
    "differs in length": lambda units: [
        u.with_document("odd", Passage(input_ids=np.zeros(2, np.int32), labels=np.zeros(1, np.int32))) for u in units
    ],
}


@pytest.mark.parametrize("arrange", BAD.values(), ids=BAD)
def test_what_arrange_must_not_do_is_refused(arrange):
    with pytest.raises(LuthierError) as caught:
        UnitLayout(max_length=9, arrange=arrange).lay_out(judged(3))
    assert caught.value.code == "part-invalid"


def test_an_evaluation_arranges_groups_of_one_global_batch():
    layout = UnitLayout(max_length=9, arrange=mismatched, shares_prompts=True)
    grouped = layout.lay_out_groups(TokenDataset.of(judged(5)), 2)
    alone = [e for at in (0, 2, 4) for e in layout.lay_out(judged(5)[at : at + 2]).examples]
    assert [e.input_ids.tolist() for e in grouped] == [e.input_ids.tolist() for e in alone]
