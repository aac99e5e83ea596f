"""Rows mean the same in every container: the nulls that Arrow adds to unlike objects are not the author's."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from luthier.data.read.added_nulls import remove_nulls

QUIET = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.text("ab é", max_size=4)
PLACES = st.fixed_dictionaries({}, optional={"lat": st.integers(0, 9), "name": WORDS})
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": WORDS,
        "days": st.integers(0, 9),
        "exact": st.booleans(),
        "place": PLACES,
        "stops": st.lists(PLACES, max_size=2),
        "words": st.lists(WORDS, max_size=2),
    },
)
KINDS = st.fixed_dictionaries(
    {"type": st.sampled_from(["string", "number"])}, optional={"enum": st.lists(WORDS, max_size=2)}
)
SCHEMAS = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.fixed_dictionaries({}, optional={"city": KINDS, "days": KINDS})},
    optional={"required": st.lists(WORDS, max_size=2)},
)
ALL = {
    "city": "a", "days": 1, "exact": True, "place": {"lat": 1, "name": "b"}, "stops": [{"lat": 1, "name": "b"}],
    "words": ["a"],
}  # fmt: skip
FULL = {"type": "object", "properties": {n: {"type": "string", "enum": ["a"]} for n in ("city", "days")},
        "required": ["a"]}  # fmt: skip


def in_order(value, like):
    """The object with its keys in the order of another: Arrow has one order for all objects."""
    if isinstance(value, list):
        return [in_order(held, like[0]) for held in value]
    return {key: in_order(value[key], like[key]) for key in like if key in value} if isinstance(value, dict) else value


def row_of(arguments, schema):
    """A conversation that calls a tool; its schema stands in the row."""
    function = {"name": "look", "description": "Looks.", "parameters": schema}
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "A"},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": function}]}


def as_lines(rows, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_parquet(rows, folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def as_dataset(rows, _):
    import datasets

    return datasets.Dataset.from_list(rows)


def as_iterable(rows, folder):
    return as_dataset(rows, folder).to_iterable_dataset()


CONTAINERS = {
    "parquet": as_parquet,
    "dataset": as_dataset,
    "iterable": as_iterable,
}


@pytest.mark.parametrize("container", CONTAINERS)
@QUIET
@given(rows=st.lists(st.tuples(ARGUMENTS, SCHEMAS), min_size=1, max_size=4))
def test_the_same_rows_give_the_same_tokens_in_every_container(container, rows, chat, made, from_file, tmp_path):
    rows = [row_of(in_order(a, ALL), in_order(s, FULL)) for a, s in [(ALL, FULL), *rows]]
    wanted = from_file(as_lines(rows, tmp_path), chat("qwen")).train
    held = CONTAINERS[container](rows, tmp_path)
    found = (from_file if isinstance(held, str) else made)(held, chat("qwen")).train
    assert found.fingerprint == wanted.fingerprint


@pytest.mark.parametrize("container", CONTAINERS)
def test_unlike_arguments_stay_unlike(container, chat, made, from_file, answers, tmp_path):
    rows = [row_of({"city": "Oslo"}, FULL), row_of({"a": 1}, FULL)]
    held = CONTAINERS[container](rows, tmp_path)
    train = (from_file if isinstance(held, str) else made)(held, chat("qwen")).train
    calls = [answers(example, chat("qwen"))[0] for example in train]
    assert ['"arguments": {"city": "Oslo"}}' in calls[0], '"arguments": {"a": 1}}' in calls[1]] == [True, True]


def test_a_null_that_the_author_wrote_stays(chat, made, from_file, answers, tmp_path):
    rows = [row_of({"city": None}, FULL), row_of({"a": 1}, FULL)]
    path = as_lines(rows, tmp_path)
    for train in (from_file(path, chat("qwen")).train, made(rows, chat("qwen")).train):
        assert '"arguments": {"city": null}}' in answers(train[0], chat("qwen"))[0]


def test_the_type_json_of_the_library_datasets_keeps_what_the_author_wrote(chat, made, answers, tmp_path):
    import datasets

    path = as_lines([row_of({"city": None}, FULL), row_of({"city": {"a": 1}}, FULL)], tmp_path)
    kept = datasets.load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json" in repr(kept.features)
    assert '"arguments": {"city": null}}' in answers(made(kept, chat("qwen")).train[0], chat("qwen"))[0]


def test_a_null_in_a_list_is_nobodys_filling():
    assert remove_nulls({"a": [1, None, {"b": None, "c": 0}], "d": None}) == {"a": [1, None, {"c": 0}]}
