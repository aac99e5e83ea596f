"""Every reader gives the same rows with their places, and says exactly what is wrong with a file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import socket
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.read.jsonfiles import RepeatedKey, has_keys, parse_json
from luthier.data.read.sources import find_files, read_given, read_source
from luthier.recipe.schema import Source
from luthier.testing import expect_error

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
ROWS = st.lists(st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}), min_size=1, max_size=4)
QUIET = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_parquet(rows):
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_table(rows, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


WRITERS = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "array.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "object.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "named.json": lambda rows: json.dumps({f"row {i}": row for i, row in enumerate(rows)}).encode(),
    "lines.json": as_lines,
    "a.csv": as_table,
    "a.tsv": lambda rows: as_table(rows, "\t"),
    "a.parquet": as_parquet,
}


def written(folder, name, content):
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(path, unit="paragraph", **options):
    return list(read_source(Source(path=str(path), **options), unit))


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", WRITERS)
@QUIET
@given(rows=ROWS)
def test_every_format_gives_back_the_rows_that_were_written(name, ending, rows, tmp_path):
    path = written(tmp_path, name + ending, WRITERS[name](rows))
    found = read(path)
    assert [row.values for row in found] == rows
    assert all(row.where.startswith(f"{path}:") for row in found)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n', [1, 3]),
        ("a.json", b'[\n {"text": "a"},\n\n {"text":\n "b"}\n]', [2, 4]),
        ("b.json", b'{"text": "a"}\n{"text": "b"}\n', [1, 2]),
        ("a.csv", b'text,n\n"a\nb",1\n\nc,2\n', [2, 5]),
        ("a.txt", b"\n\na\nb\n \nc\n", [3, 6]),
    ],
)
def test_a_row_knows_the_line_that_it_begins_on(name, content, places, tmp_path):
    path = written(tmp_path, name, content)
    assert [row.where for row in read(path)] == [f"{path}:{line}" for line in places]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("unit", "texts"),
    [
        ("line", ["One", "two", "Three", "Four"]),
        ("paragraph", ["One\ntwo", "Three", "Four"]),
        ("file", ["One\ntwo\n\nThree\n  \n\nFour\n"]),
    ],
)
def test_plain_text_is_cut_into_its_units(unit, texts, ending, tmp_path):
    path = written(tmp_path, "a.txt" + ending, b"One\ntwo\n\nThree\n  \n\nFour\n")
    assert [row.values for row in read(path, unit)] == [{"text": text} for text in texts]


def test_a_blank_line_inside_a_chatml_turn_does_not_end_the_paragraph(tmp_path):
    first = "<|im_start|>user\nOne\n\ntwo<|im_end|>\n<|im_start|>assistant\nThree<|im_end|>"
    path = written(tmp_path, "a.txt", f"{first}\n\n{first}\n".encode())
    assert [row.values["text"] for row in read(path)] == [first, first]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for name, content in (("a.jsonl", b'{"text": "a"}'), ("a.csv", b"text\na"), ("a.txt", b"a")):
        path = written(tmp_path, name, b"\xef\xbb\xbf" + content)
        assert [row.values for row in read(path)] == [{"text": "a"}]


def test_a_field_of_a_table_may_be_longer_than_the_library_allows_by_itself(tmp_path):
    before = csv.field_size_limit()
    path = written(tmp_path, "a.csv", as_table([{"text": "x" * 200_000}]))
    assert len(read(path)[0].values["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_a_glob_reads_its_files_in_order_of_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        written(tmp_path, name, as_lines([{"text": name}]))
    assert [row.values["text"] for row in read(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert len(read(tmp_path / "*.jsonl", max_rows=2)) == 2


def test_environment_variables_in_a_path_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", str(tmp_path))
    written(tmp_path, "a.txt", b"a")
    assert len(read("${SOME_FOLDER}/a.txt")) == 1
    with expect_error("data-not-found", "${NO_SUCH_FOLDER}/a.txt") as caught:
        read("${NO_SUCH_FOLDER}/a.txt")
    assert caught.value.code == "data-not-found"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    "path",
    [
        "no.jsonl",
        "no/such/file.parquet",
        "no.jsonl.gz",
        "no.gz",
        "*.jsonl",
        "./no",
        "/no",
        "~/no-such",
        "a/b/c",
        "https://x.y/z",
        "a\0b",
        "n" * 5000,
    ],
)
def test_a_path_that_can_only_be_a_file_is_not_looked_for_on_the_hub(path, offline):
    with pytest.raises(LuthierError) as caught:
        read(path)
    assert caught.value.code == "data-not-found" and caught.value.where == path
    assert "hub" not in caught.value.problem


@pytest.mark.parametrize("name", ["squad", "openai/gsm8k", "org/name-1.0"])
def test_a_path_without_a_files_suffix_may_be_a_hub_datasets_name(name):
    assert find_files(name) == []


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    written(tmp_path, "train.jsonl", b"")
    with expect_error("data-not-found", "trian.jsonl", "'train.jsonl'"):
        read(tmp_path / "trian.jsonl")


BROKEN = {
    "not JSON": ("a.jsonl", b'{"a": 1}\n{"a": \n', 2, "data-row"),
    "NaN": ("a.jsonl", b'{"a": NaN}\n', 1, "data-row"),
    "Infinity": ("a.jsonl", b'{"a": 1}\n\n{"a": -Infinity}\n', 3, "data-row"),
    "two objects in a line": ("a.jsonl", b'{"a": 1} {"a": 2}\n', 1, "data-row"),
    "a list in a line": ("a.jsonl", b"[1, 2]\n", 1, "data-row"),
    "half a surrogate pair": ("a.jsonl", b'{"a": "\\ud83d"}\n', 1, "data-row"),
    "endless nesting": ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b"\n", 2, "data-row"),
    "a number of 10000 digits": ("a.jsonl", b'{"a": ' + b"1" * 10_000 + b"}\n", 1, "data-row"),
    "Latin-1": ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', 2, "data-unreadable"),
    "NUL bytes": ("a.jsonl", b'{"a": 1}\n{"a": "\0"}\n', 2, "data-unreadable"),
    "UTF-16": ("a.txt", "abc".encode("utf-16"), 1, "data-unreadable"),
    "gzip without its suffix": ("a.txt", gzip.compress(b"abc"), 1, "data-unreadable"),
    "a repeated key": ("a.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', 2, "data-row"),
    "a repeated key inside": ("a.jsonl", b'{"a": [{"b": 1, "c": 2, "b" : 2}]}\n', 1, "data-row"),
    "a repeated key in an array": ("a.json", b'[\n{"a": 1},\n{"b": 1, "b": 2}]', 3, "data-unreadable"),
    "a cut array": ("a.json", b'[\n{"a": 1},\n{"a": 2}\n', 4, "data-unreadable"),
    "a comma at the end": ("a.json", b'[\n{"a": 1},\n]\n', 3, "data-unreadable"),
    "a missing comma": ("a.json", b'[\n{"a": 1}\n{"a": 2}]', 3, "data-unreadable"),
    "text after the array": ("a.json", b'[{"a": 1}]\nx', 1, "data-unreadable"),
    "NaN in an array": ("a.json", b'[\n{"a": NaN}]', 2, "data-unreadable"),
    "a number in an array": ("a.json", b'[{"a": 1},\n 2]', 2, "data-row"),
    "a bare number": ("a.json", b"12", 1, "data-unreadable"),
    "an object without rows": ("a.json", b'{"a": 1}', 1, "data-unreadable"),
    "too many fields": ("a.csv", b"a,b\n1,2\n1,2,3\n", 3, "data-row"),
    "too few fields": ("a.csv", b'a,b\n"1\n1",2\n1\n', 4, "data-row"),
    "an open quote": ("a.csv", b'a,b\n1,"2\n', 2, "data-row"),
    "a repeated column": ("a.csv", b"a,a\n1,2\n", 1, "data-unreadable"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_with_its_line(name, tmp_path):
    file, content, line, code = BROKEN[name]
    path = written(tmp_path, file, content)
    with pytest.raises(LuthierError) as caught:
        [row.whole for row in read(path)]
    assert (caught.value.code, caught.value.where) == (code, f"{path}:{line}")


@given(
    pairs=st.lists(st.tuples(st.text('ab":\\ \t\n', max_size=3), st.text('ab":\\ \t', max_size=5)), max_size=4),
    colon=st.sampled_from([":", ": ", " :", "\t:", "\n:", "\r :"]),
)
@settings(max_examples=60)
@example(pairs=[("a", 1), ("a", True)], colon=":")
@example(pairs=[("a", "b"), ("a", "b")], colon=" :")
def test_no_key_with_two_values_passes_however_it_is_written(pairs, colon):
    entries = ", ".join(f"{json.dumps(key)}{colon}{json.dumps(value)}" for key, value in pairs)
    text = f"{{{entries}}}"
    kept = dict(pairs)
    assert len(kept) == len(pairs) or not has_keys(text, len(kept))
    if all(repr(kept[key]) == repr(value) for key, value in pairs):
        assert parse_json(text) == (kept, len(text))
    else:
        with pytest.raises(RepeatedKey, match="given twice"):
            parse_json(text)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz", "a.parquet.gz"])
def test_a_gzip_file_that_is_cut_short_is_an_error(name, tmp_path):
    path = written(tmp_path, name, b"")
    path.write_bytes(gzip.compress(as_lines([{"text": str(i)} for i in range(1000)]))[:-9])
    place = name if "parquet" in name else f"{name}:1001"
    with expect_error("data-unreadable", place):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "header.csv", "a.parquet"])
def test_a_file_without_rows_is_an_error(name, tmp_path):
    content = {"header.csv": b"a,b\n", "a.parquet": as_parquet([{"a": 1}][:0])}.get(name, b"\n")
    path = written(tmp_path, name, content)
    with pytest.raises(LuthierError) as caught:
        read(path)
    assert (caught.value.code, caught.value.where) == ("data-empty", str(path))


def test_a_folder_and_an_unknown_suffix_are_errors_that_list_the_known_ones(tmp_path):
    for path in (tmp_path, written(tmp_path, "a.xlsx", b"x"), written(tmp_path, "a.xlsx.gz", b"x")):
        with pytest.raises(LuthierError, match=r"\.jsonl, .*\.parquet") as caught:
            read(path)
        assert caught.value.code == "data-unreadable"


def test_rows_in_python_and_datasets_objects_give_the_same_rows():
    import datasets

    rows = [{"messages": [{"role": "user", "content": "a"}], "n": i} for i in range(3)]
    made = datasets.Dataset.from_list(rows)
    for given_rows in (rows, tuple(rows), iter(rows), made, made.to_iterable_dataset()):
        found = list(read_given(given_rows, "data"))
        assert [row.values for row in found] == rows
        assert [row.where for row in found] == ["data[0]", "data[1]", "data[2]"]


@pytest.mark.parametrize("rows", [{"a": 1}, "text", 5, [1, 2], [["a"]]])
def test_python_values_that_are_no_rows_are_errors(rows):
    with pytest.raises(LuthierError) as caught:
        [row.whole for row in read_given(rows, "data")]
    assert caught.value.code in ("data-unreadable", "data-row") and caught.value.where.startswith("data")


def test_reading_imports_nothing_heavy(tmp_path):
    path = written(tmp_path, "a.jsonl", as_lines([{"text": "a"}]))
    code = (
        "import sys; from luthier.data.read.sources import read_source; from luthier.recipe.schema import Source;"
        "from luthier.data.formats.recognise_form import convert_row, recognise_format;"
        f"rows = list(read_source(Source(path={str(path)!r}))); convert_row(rows[0], recognise_format(rows, 'a'));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
