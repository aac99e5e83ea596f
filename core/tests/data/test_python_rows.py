"""Rows of every library: the same rows give the same tokens, whoever holds them and whatever their numbers are."""

from __future__ import annotations

import json
from collections import deque
from types import MappingProxyType

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.prepare import prepare_data
from luthier.data.read import row_limit
from luthier.data.read.python_rows import plain_value
from luthier.data.read.sources import read_given
from luthier.recipe.schema import Data, Source
from luthier.testing import expect_error

QUIET = settings(max_examples=25, deadline=None)
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = [{"messages": TALK, "id": i, "tools": None} for i in range(5)]
HOLDERS = {
    "list": lambda rows: rows,
    "tuple": tuple,
    "deque": deque,
    "iterator": iter,
    "generator": lambda rows: (row for row in rows),
    "mappings": lambda rows: [MappingProxyType(row) for row in rows],
    "array": lambda rows: np.array(rows, dtype=object),
    "dataset": datasets.Dataset.from_list,
    "numpy_dataset": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "frame": pandas.DataFrame,
    "table": pyarrow.Table.from_pylist,
    "batch": pyarrow.RecordBatch.from_pylist,
    "reader": lambda rows: pyarrow.Table.from_pylist(rows).to_reader(max_chunksize=2),
}
NUMBERS = {
    "numpy_scalars": lambda ids: [np.int64(i) for i in ids],
    "small_scalars": lambda ids: [np.uint8(i) for i in ids],
    "array": np.array,
    "small_array": lambda ids: np.array(ids, np.int16),
    "tuple": tuple,
    "tensor": torch.tensor,
    "tensors": lambda ids: [torch.tensor(i) for i in ids],
    "series": pandas.Series,
    "arrow": pyarrow.array,
}


def run(rows, tokenizer, **options):
    return prepare_data(Data(train=[Source(path="data")], **options), tokenizer, seed=0, given=rows)


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder_of_rows_gives_the_same_tokens(holder, chat):
    expected = run(ROWS, chat("chatml"))
    found = run(HOLDERS[holder](ROWS), chat("chatml"))
    assert found.train.fingerprint == expected.train.fingerprint
    assert found.train.where == expected.train.where == tuple(f"data[{i}]" for i in range(5))
    assert found.report == expected.report


@pytest.mark.parametrize("holder", ["tuple", "frame", "table", "batch", "dataset"])
def test_every_holder_that_can_be_read_again_is_streamed(holder, chat):
    stream = run(HOLDERS[holder](ROWS), chat("chatml"), streaming=True).train
    assert [e.where for e in stream.head(9)] == [f"data[{i}]" for i in range(5)]


@pytest.mark.parametrize("holder", ["iterator", "generator", "reader"])
def test_what_gives_its_rows_once_is_no_stream(holder, chat):
    with expect_error("data-format", "data"):
        run(HOLDERS[holder](ROWS), chat("chatml"), streaming=True)


@pytest.mark.parametrize("kind", NUMBERS)
def test_ids_of_every_library_are_ids(kind, chat):
    ids, labels, mask = [5, 6, 7, 0], [5, 6, 7, 0], [1, 1, 1, 0]
    rows = [{"input_ids": NUMBERS[kind](ids), "labels": NUMBERS[kind](labels), "attention_mask": NUMBERS[kind](mask)}]
    example = run(rows, chat(None)).train[0]
    assert example.input_ids.tolist() == [5, 6, 7] and example.labels.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    "mask", [[True, True, False], np.array([True, True, False]), torch.tensor([True, True, False])]
)
def test_masks_may_be_truth_values(mask, chat):
    ids = {"input_ids": [5, 6, 7]}
    assert run([{**ids, "attention_mask": mask}], chat(None)).train[0].input_ids.tolist() == [5, 6]
    assert run([{**ids, "loss_mask": mask}], chat(None)).train[0].labels.tolist() == [5, 6, -100]


@pytest.mark.parametrize("wrong", [[5.0, 6.0], np.array([5.0, 6.0]), [True, False], ["5"], np.array(["5"])])
def test_numbers_that_are_no_ids_are_still_refused(wrong, chat):
    with expect_error("data-row", "data[0]: input_ids[0]"):
        run([{"input_ids": wrong}], chat(None))


def test_flags_and_weights_of_numpy_are_numbers(chat):
    row = {
        "messages": [TALK[0], {**TALK[1], "weight": np.float32(0.5), "train": np.bool_(True)}],
        "label": np.bool_(True),
    }
    assert run([row], chat("chatml")).train.weights.tolist() == [0.5]


def test_a_missing_cell_of_a_frame_is_null(chat):
    frame = pandas.DataFrame(
        {"instruction": ["a", "b"], "input": ["x", None], "output": ["1", "2"], "weight": [1, None]}
    )
    rows = [{"instruction": "a", "input": "x", "output": "1"}, {"instruction": "b", "output": "2"}]
    assert run(frame, chat("chatml")).train.fingerprint == run(rows, chat("chatml")).train.fingerprint
    assert [row.values["weight"] for row in read_given(frame, "data")] == [1.0, None]


def test_a_frame_whose_columns_have_no_names_of_their_own_is_refused():
    for columns in ([0, 1], ["a", "a"]):
        with expect_error("data-unreadable", "data"):
            list(read_given(pandas.DataFrame([["x", "y"]], columns=columns), "data"))


def test_a_column_of_arrow_is_no_table():
    with expect_error("data-unreadable", "data"):
        list(read_given(pyarrow.array([1, 2]), "data"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def disguised(value):
    """The same value in the types of other libraries."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int64(value)
    if isinstance(value, str):
        return np.str_(value)
    if isinstance(value, list):
        return tuple(disguised(item) for item in value)
    return MappingProxyType({k: disguised(v) for k, v in value.items()}) if isinstance(value, dict) else value


@QUIET
@given(value=VALUES)
def test_any_value_is_the_same_under_its_disguise_and_plain_after_it(value):
    found = plain_value(disguised(value))
    assert found == value and json.dumps(found) == json.dumps(value)
    assert plain_value(value) == value


def test_a_row_that_holds_itself_is_bad_and_no_crash(chat):
    row = {"messages": TALK}
    row["self"] = row
    with expect_error("data-row", "data[0]") as caught:
        run([row], chat("chatml"))
    assert (caught.value.code, caught.value.where) == ("data-row", "data[0]")


CALLS = [None, "", "  ", "{}", {}, np.str_("")]


@pytest.mark.parametrize("arguments", CALLS)
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_no_arguments_are_an_empty_object(arguments, name, chat):
    def called(given):
        call = {"type": "function", "id": "c1", "function": {"name": "now", "arguments": given}}
        return run([{name: [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}], chat("qwen"))

    assert called(arguments).train.fingerprint == called({}).train.fingerprint
    for wrong in ("[1]", "5", '"a"', [1], 5, True, "not json", '{"a": '):
        with pytest.raises(LuthierError) as caught:
            called(wrong)
        assert caught.value.where == f"data[0]: {name}[1].tool_calls[0].arguments"


def test_one_limit_of_size_holds_for_rows_of_every_container(tmp_path, chat, monkeypatch):
    monkeypatch.setattr(row_limit, "LIMIT", 1000)
    long, short = "x" * 1001, "x" * 900
    files = {
        "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in (short, long)),
        "a.json": json.dumps([{"text": short}, {"text": long}]),
        "a.csv": f"text,b\n{short},\n{short},{'y' * 200}\n",
        "a.txt": f"{short}\n\n{long}\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        place = f"{name}:{ {'a.jsonl': 2, 'a.json': 1}.get(name, 3) }"
        with expect_error("data-row", place, "1,000"):
            prepare_data(Data(train=[Source(path=str(tmp_path / name))], max_length=4000), chat(None), seed=0)
    rows = [{"text": short}, {"text": long}, {"input_ids": [1] * 126}]
    with expect_error("data-row", "data[1]", "1,000") as caught:
        run(rows[:2], chat(None))
    assert caught.value.where == "data[1]"
    with expect_error("data-row", "data[0]", "1,000"):
        run(rows[2:], chat(None))
    assert len(run(rows[:2], chat(None), bad_rows="drop", max_length=4000).train) == 1
    endless = tmp_path / "endless.jsonl"
    endless.write_text('{"text": "' + "x" * 10_000)
    with expect_error("data-row", "endless.jsonl:1", "1,000"):
        prepare_data(Data(train=[Source(path=str(endless))]), chat(None), seed=0)


def test_whole_numbers_beside_a_missing_one_stay_whole_in_a_frame():
    rows = [{"a": 1, "b": 1.5, "c": 2.0}, {"a": None, "b": None, "c": 3.0}, {"a": 2**40, "b": 2.0, "c": 4.0}]
    found = [row.values for row in read_given(pandas.DataFrame(rows), "data")]
    assert found == rows
    assert [type(row["a"]) for row in found] == [int, type(None), int]
    assert [type(row["b"]) for row in found] == [float, type(None), float]
    assert {type(row["c"]) for row in found} == {float}
