"""Rows of tokens compute and learn as rows of the whole weight would, and switched off they are not there."""

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import EmbeddingRows, LuthierError, check_token_rows, find_row_places, place_token_rows
from luthier.model.weights.token_rows import HeadRows
from luthier.testing.worlds import tiny_model

TOKENS = torch.arange(64)[None]
MODELS = st.sampled_from(["llama", "gpt2", "gemma2"])  # two heads, one tied, one whose embeddings are scaled
IDS = st.lists(st.integers(1, 63), min_size=1, max_size=5, unique=True)


@attrs.define
class Switch:
    enabled: bool = True


@settings(max_examples=6, deadline=None)
@given(ids=IDS, architecture=MODELS)
def test_rows_learn_what_the_rows_of_a_weight_that_trains_whole_would(ids, architecture):
    model, whole = (tiny_model(architecture).double() for _ in range(2))
    placed = place_token_rows(model, ids, own_head=True)
    outputs = [one(TOKENS, labels=TOKENS) for one in (model, whole)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-10, rtol=1e-10)
    for output in outputs:
        output.loss.backward()
    for path, rows in placed.items():
        expected = whole.get_submodule(path).weight.grad[ids]
        torch.testing.assert_close(rows.rows.grad, expected, atol=1e-10, rtol=1e-10)


@settings(max_examples=6, deadline=None)
@given(ids=IDS, architecture=MODELS, own_head=st.booleans())
def test_switched_off_the_model_is_the_base_to_the_bit_and_written_back_it_has_the_rows(ids, architecture, own_head):
    model, base = tiny_model(architecture).eval(), tiny_model(architecture).eval()
    switch = Switch()
    placed = place_token_rows(model, ids, own_head=own_head, switch=switch)
    with torch.no_grad():
        for rows in {id(one.rows): one.rows for one in placed.values()}.values():
            rows.add_(0.5)
        on = model(TOKENS).logits
        switch.enabled = False
        assert torch.equal(model(TOKENS).logits, base(TOKENS).logits) and not torch.equal(on, base(TOKENS).logits)
        for path, module in placed.items():
            model.set_submodule(path, module.write_rows())
        torch.testing.assert_close(model(TOKENS).logits, on, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "own_head", "heads"), [("llama", False, 0), ("llama", True, 1), ("gpt2", False, 1)]
)
def test_a_head_gets_rows_where_it_is_tied_or_is_to_have_its_own(architecture, own_head, heads):
    model = tiny_model(architecture)
    kinds = list(find_row_places(model, own_head=own_head).values())
    assert kinds == [EmbeddingRows, *[HeadRows] * heads]
    placed = place_token_rows(model, [3], own_head=own_head)
    assert [one.owns for one in placed.values()] == [True, *[architecture == "llama"] * heads]
    shared = len({id(one.rows) for one in placed.values()})
    assert shared == (2 if own_head else 1)


@pytest.mark.parametrize("ids", [[3, 3], [320], [-1]])
def test_ids_that_are_no_rows_are_refused_with_the_number_of_rows(ids):
    with pytest.raises(LuthierError) as caught:
        check_token_rows(tiny_model(), ids, where="token_ids", own_head=True)
    assert (caught.value.code, caught.value.where, caught.value.found) == ("recipe-out-of-range", "token_ids", ids)
    assert "320" in str(caught.value)


def test_a_weight_of_codes_is_refused():
    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    check_token_rows(model, [3], where="token_ids", own_head=False)
    with pytest.raises(LuthierError, match="lm_head"):
        check_token_rows(model, [3], where="token_ids", own_head=True)
