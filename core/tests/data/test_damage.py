"""Damaged files: every reader gives rows or an error with a place, never a traceback, never nothing."""

from __future__ import annotations

import gzip
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.formats.recognise_form import FORMATS, convert_row, recognise_format
from luthier.data.prepare import prepare_data
from luthier.data.read.row import Row
from luthier.data.read.sources import read_rows
from luthier.recipe.schema import Data, Source

NAMES = ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet")
QUIET = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole(name, tmp_path):
    """The bytes of a sound file of this kind."""
    rows = [{"prompt": f"quest {i} é\n", "completion": f'"answer, {i}" 漢'} for i in range(30)]
    if name == "a.parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / "whole.parquet", write_page_checksum=True
        )
        return (tmp_path / "whole.parquet").read_bytes()
    if name == "a.json":
        return json.dumps(rows, indent=1).encode()
    if name == "a.jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name == "a.txt":
        return "\n\n".join(row["prompt"] + row["completion"] for row in rows).encode()
    delimiter = "," if name == "a.csv" else "\t"
    quoted = ['"' + value.replace('"', '""') + '"' for row in rows for value in row.values()]
    lines = [delimiter.join(pair) for pair in zip(quoted[::2], quoted[1::2], strict=True)]
    return "\n".join([delimiter.join(rows[0]), *lines]).encode()


def damaged(content, how, seed):
    draw = random.Random(seed)
    if how == "cut":
        return content[: draw.randrange(len(content))]
    if how == "flipped":
        out = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
        return bytes(out)
    if how == "spliced":
        a, b = sorted(draw.randrange(len(content)) for _ in range(2))
        return content[:a] + content[b:] + content[a:b]
    if how == "random":
        return draw.randbytes(draw.randint(0, 400))
    return b"".join(
        draw.choice([b"{", b"[", b'"', b"}", b"]", b",", b":", b"\n", b"1", b"\\u", b"a"]) for _ in range(300)
    )


def rows_or_error(path):
    try:
        rows = list(read_rows(path))
    except LuthierError as error:
        assert error.code in ("data-unreadable", "data-row", "data-empty") and error.where.startswith(str(path))
        return []
    assert rows and all(isinstance(row.values, dict) and row.where.startswith(str(path)) for row in rows)
    return rows


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", NAMES)
@QUIET
@given(
    how=st.sampled_from(["cut", "flipped", "spliced", "random", "nested"]),
    seed=st.integers(0, 2**32),
    inside=st.booleans(),
)
def test_a_damaged_file_gives_rows_or_an_error_with_a_place(name, ending, how, seed, inside, tmp_path):
    content = whole(name, tmp_path)
    path = tmp_path / (name + ending)
    if not ending:
        path.write_bytes(damaged(content, how, seed))
    elif inside:
        path.write_bytes(gzip.compress(damaged(content, how, seed), mtime=0))
    else:
        path.write_bytes(damaged(gzip.compress(content, mtime=0), how, seed))
    rows_or_error(path)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**40)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["user", "assistant", "gpt", "human", "\n\nHuman: a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "messages",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "type",
                    "text",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "input_ids",
    "labels",
    "len",
    "chosen",
    "rejected",
    "tools",
    "system",
)


@settings(max_examples=150, deadline=None)
@given(values=st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5), form=st.sampled_from(sorted(FORMATS)))
def test_a_row_of_wrong_nesting_is_converted_or_an_error_with_its_place(values, form):
    row = Row(values, "a.jsonl:7")
    try:
        recognise_format([row], "a.jsonl")
    except LuthierError as error:
        assert error.code == "data-format" and error.where == "a.jsonl"
    try:
        assert convert_row(row, form).where == "a.jsonl:7"
    except LuthierError as error:
        assert error.code in ("data-row", "model-vocabulary") and error.where.startswith("a.jsonl:7")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(how=st.sampled_from(["cut", "flipped", "spliced", "nested"]), seed=st.integers(0, 2**32))
def test_a_damaged_file_is_prepared_or_refused_and_no_row_is_lost_unsaid(how, seed, tmp_path, chat):
    path = tmp_path / "a.jsonl"
    path.write_bytes(damaged(whole("a.jsonl", tmp_path), how, seed))
    try:
        report = prepare_data(Data(train=[Source(path=str(path))], unsupervised="drop"), chat("chatml"), seed=0).report
    except LuthierError as error:
        assert error.where.startswith(str(path)) or error.code == "data-empty"
        return
    assert report.rows == sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    assert report.examples + report.dropped == report.rows
