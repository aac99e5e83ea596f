"""Pretraining blocks: no token lost, none twice, documents apart, remainders carried."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from luthier.data.batches.batch import collate_examples
from luthier.data.examples import IGNORED, TokenDataset, TokenExample
from luthier.data.prepare import prepare_data
from luthier.data.tokenise.token_blocks import Blocks
from luthier.errors import LuthierError
from luthier.recipe.schema import Data
from luthier.testing.worlds import tiny_tokenizer

LENGTHS = st.lists(st.integers(1, 40), max_size=20)


def documents(lengths, seed=0):
    ids = np.random.default_rng(seed).permutation(sum(lengths)).astype(np.int32)
    pieces = np.split(ids, np.cumsum(lengths)[:-1]) if lengths else []
    return TokenDataset.of([TokenExample(input_ids=p, labels=p, where=f"doc {i}") for i, p in enumerate(pieces)])


def blocks_of(parts, size):
    blocks = Blocks(size=size)
    return TokenDataset.joined([*(blocks.add(part) for part in parts), blocks.end()])


@settings(deadline=None, max_examples=150, derandomize=True)
@given(LENGTHS, st.integers(2, 25))
def test_every_token_comes_once_in_order_in_full_blocks_and_a_last_one(lengths, size):
    whole = documents(lengths)
    found = blocks_of([whole], size)
    assert np.array_equal(found.input_ids, whole.input_ids)
    assert np.array_equal(found.labels, whole.labels)
    assert found.lengths.tolist() == [size] * (sum(lengths) // size) + [sum(lengths) % size] * (sum(lengths) % size > 0)
    begins = {*np.cumsum([0, *lengths])[:-1].tolist(), *found.starts[:-1].tolist()} if lengths else set()
    assert found.firsts.tolist() == sorted(begins)
    assert found.num_supervised.sum() == sum(lengths) - len(begins)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(LENGTHS, st.integers(2, 25), st.lists(st.integers(0, 20), max_size=5))
def test_what_is_left_over_is_carried_so_that_it_does_not_matter_how_documents_come(lengths, size, cuts):
    whole = documents(lengths)
    borders = [0, *sorted(min(c, len(lengths)) for c in cuts), len(lengths)]
    parts = [TokenDataset.of(whole.head(b)[a:]) for a, b in zip(borders, borders[1:], strict=False)]
    one, other = blocks_of([whole], size), blocks_of(parts, size)
    assert one.fingerprint == other.fingerprint
    assert one.where == other.where


def test_a_block_bears_the_place_of_the_document_that_it_begins_with():
    found = blocks_of([documents([3, 9, 2, 4])], 5)
    assert found.where == ("doc 0", "doc 1", "doc 1", "doc 3")
    assert [example.starts.tolist() for example in found] == [[0, 3], [0], [0, 2, 4], [0]]


def test_documents_of_a_block_are_documents_of_the_batch():
    found = blocks_of([documents([3, 9, 2, 4])], 5)
    pieces = [(0, 3), (3, 5), (5, 10), (10, 12), (12, 14), (14, 15), (15, 18)]
    alone = [TokenExample(input_ids=found.input_ids[a:b], labels=found.labels[a:b]) for a, b in pieces]
    joined, apart = collate_examples(list(found)), collate_examples(alone)
    for name in ("input_ids", "labels", "position_ids", "document_starts", "previous", "token_weights", "continues"):
        assert torch.equal(getattr(joined, name), getattr(apart, name)), name
    assert joined.where == ("doc 0", "doc 0", "doc 1", "doc 1", "doc 1", "doc 1", "doc 3")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_each_document_begins_with_the_bos_that_the_tokenizer_puts_and_ends_with_one_eos(adds_bos):
    tokenizer = tiny_tokenizer()
    if not adds_bos:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    texts = ["one", "twenty-two", "3</s>", "four more"]
    found = prepare_data(Data(train=[], block_size=8), tokenizer, seed=0, given=[{"text": t} for t in texts])
    text = tokenizer.decode(found.train.input_ids, skip_special_tokens=False)
    bos = "<s>" * adds_bos
    assert text == "".join(f"{bos}{t.removesuffix('</s>')}</s>" for t in texts)
    assert found.train.lengths.tolist()[:-1] == [8] * (len(found.train) - 1)
    supervised = np.where(found.train.input_ids == 1, IGNORED, found.train.input_ids)  # nothing predicts a BOS
    assert np.array_equal(found.train.labels, supervised)
    assert found.stop_tokens == (2,)
    assert found.report.examples == len(found.train)


def test_long_documents_are_neither_dropped_nor_split_by_max_length():
    rows = [{"text": "x" * 100}] * 3
    found = prepare_data(
        Data(train=[], block_size=64, max_length=10, overlong="error"), tiny_tokenizer(), seed=0, given=rows
    )
    assert found.train.lengths.tolist() == [64] * 4 + [3 * 102 - 256]
    assert not found.report.drops


def test_pretokenised_rows_stay_as_they_are():
    rows = [{"input_ids": [9, 8, 7]}, {"input_ids": [6, 5], "labels": [6, IGNORED]}]
    found = prepare_data(Data(train=[], block_size=4, unsupervised="drop"), tiny_tokenizer(), seed=0, given=rows).train
    assert found.input_ids.tolist() == [9, 8, 7]
    rows[1]["labels"] = [IGNORED, 5]
    found = prepare_data(Data(train=[], block_size=4), tiny_tokenizer(), seed=0, given=rows).train
    assert found.labels.tolist() == [9, 8, 7, IGNORED, 5]
    assert found.num_supervised.tolist() == [2, 0]


def test_conversations_are_not_cut_into_blocks():
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(LuthierError) as caught:
        prepare_data(Data(train=[], block_size=4), tiny_tokenizer(), seed=0, given=rows)
    assert (caught.value.code, caught.value.where) == ("recipe-conflict", "data.block_size")
    assert "prompt_completion" in str(caught.value)


def test_the_examples_as_the_loss_sees_them_are_shown_document_by_document():
    from luthier.data.inspect_examples import inspect

    tokenizer = tiny_tokenizer()
    prepared = prepare_data(Data(train=[], block_size=10), tokenizer, seed=0, given=[{"text": "ab"}, {"text": "cdef"}])
    (first, *_) = inspect(prepared, tokenizer, 1).examples
    assert first.pieces == (("<s>", False), ("ab</s>", True), ("<s>", False), ("cdef</s>", True))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=6), st.integers(0, 6))
def test_sets_of_several_documents_are_joined_and_taken_apart_again(groups, cut):
    examples = []
    for lengths in groups:
        flat = documents(lengths)
        inner = np.cumsum([0, *lengths[:-1]])
        examples.append(TokenExample(input_ids=flat.input_ids, labels=flat.labels, documents=inner))
    whole = TokenDataset.of(examples)
    parts = [p for p in (TokenDataset.of(examples[:cut]), TokenDataset.of(examples[cut:])) if len(p)]
    assert not parts or TokenDataset.joined(parts).fingerprint == whole.fingerprint
    for given_, found in zip(examples, whole, strict=True):
        assert found.starts.tolist() == given_.starts.tolist()
        assert found.num_supervised == given_.num_supervised == len(given_.input_ids) - len(given_.starts)
    assert whole.num_supervised.tolist() == [example.num_supervised for example in examples]
