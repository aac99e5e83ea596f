"""Rows that the processes read by themselves, a block of lines each, give what rows read in order give."""

import gzip
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.formats.wanted import TOKENS
from luthier.data.joining_set import JoiningSet
from luthier.data.line_sets import find_lines
from luthier.data.prepare import form_of, prepare_data
from luthier.data.read.line_blocks import BLOCK, LineBlock, LineFile, LinesRefused
from luthier.data.stream.source_rows import make_supplies
from luthier.recipe.schema import Data, Source

EVERY = 10**9  # a limit of rows, with which they are read in order


def chat(number, said="yes", **more):
    messages = [{"role": "user", "content": f"is it {number}?"}, {"role": "assistant", "content": said}]
    return json.dumps({"messages": messages, **more})


KINDS = {
    "plain": chat,
    "long": lambda i: chat(i, "long " * 40),
    "silent": lambda i: chat(i, ""),
    "blank": lambda i: " ",
    "broken": lambda i: '{"messages": [',
    "empty": lambda i: '{"messages": []}',
    "followed": lambda i: chat(i) + " x",
    "surrogate": lambda i: chat(i).replace("yes", "\\ud83d"),
    "unread": lambda i: chat(i, note=i),
    "image": lambda i: chat(i, images=["a"]),
    "weighed": lambda i: chat(i, w=0.5),
    "list": lambda i: "[1]",
    "repeated": lambda i: chat(i).replace('"content"', '"content": "no", "content"', 1),
    "repeated role": lambda i: chat(i).replace('"role"', '"role" : "tool","role"', 1),
    "a role once more": lambda i: chat(i).replace('"role"', '"role" : "user","role"', 1),
    "colons": lambda i: chat(i, 'so: "yes": 1 : 2'),
}
DROPPING = {"bad_rows": "drop", "unsupervised": "drop", "max_length": 120}


def plain(prepared):
    train, validation = prepared.train, prepared.validation
    sets = [train] if validation is None else [train, validation]
    return [(s.fingerprint, s.where, s.index.tolist()) for s in sets], prepared.report.to_dict(), prepared.stop_tokens


def outcome(sources, tokenizer, **options):
    try:
        return plain(prepare_data(Data(train=sources, cache=False, **options), tokenizer, seed=0))
    except LuthierError as error:
        return error.code, error.problem, error.where, error.remedy


def both_ways(path, tokenizer, source=None, **options):
    """What comes of a file whose blocks are read apart, and of the same file read in order."""
    own = source or {}
    return [
        outcome([Source(path=str(path), **own, **limit)], tokenizer, **options) for limit in ({}, {"max_rows": EVERY})
    ]


def found(path, **source):
    data = Data(train=[Source(path=str(path), **source)])
    supplies = make_supplies(data.train, None, "data", data.text_unit, telling=False)
    return find_lines(data, supplies, TOKENS, form_of)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    kinds=st.lists(st.sampled_from([*KINDS]), max_size=9), ending=st.sampled_from(["\n", "\r\n"]), drop=st.booleans()
)
def test_any_rows_give_the_same_examples_report_or_error(kinds, ending, drop, chat_tokenizer, tmp_path_factory):
    lines = [KINDS["plain"](i) for i in range(BLOCK + 9)]
    for place, kind in enumerate(kinds):
        lines[105 + place * 19] = KINDS[kind](place)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(ending.join(lines))
    one, other = both_ways(path, chat_tokenizer, **(DROPPING if drop else {}))
    assert one == other
    assert found(path) is not None


OCTETS = {
    "bom": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "not UTF-8": lambda text: text.replace("300?", "\x00").encode().replace(b"\x00", b"\xff"),
    "binary": lambda text: text.replace("300?", "\x00").encode(),
    "no rows": lambda text: b"\n \n",
    "an array": lambda text: f"[{','.join(text.split())}]".encode(),
    "an unknown column": lambda text: text.replace("messages", "messsages").encode(),
}


@pytest.mark.parametrize("kind", OCTETS)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_any_file_gives_the_same_examples_or_error(kind, suffix, chat_tokenizer, tmp_path):
    octets = OCTETS[kind]("\n".join(chat(i) for i in range(2 * BLOCK)))
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(octets) if suffix.endswith(".gz") else octets)
    one, other = both_ways(path, chat_tokenizer)
    assert one == other


@pytest.mark.parametrize("source", [{"columns": {"weight": "w"}}, {"template": {"text": "{w}!"}, "columns": {}}])
def test_columns_and_templates_are_read_in_blocks_too(source, chat_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(chat(i, w=i % 3 + 0.5) for i in range(BLOCK + 5)))
    options = {"format": "text"} if source.get("template") else {}
    one, other = both_ways(path, chat_tokenizer, source, **options)
    assert one == other
    assert isinstance(one[0], list)


def test_several_files_and_validation_give_the_same_with_two_processes(chat_tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(KINDS[k](i) for i in range(160) for k in ("plain", "silent")))
    rows = {"path": str(tmp_path / "*.jsonl")}
    options = {**DROPPING, "num_proc": 2}
    one, other = (
        outcome([Source(**rows, **limit)], chat_tokenizer, validation=[Source(**rows, **limit)], **options)
        for limit in ({}, {"max_rows": EVERY})
    )
    assert one == other
    assert len(one[0]) == 2


def test_an_overlong_row_and_an_unreadable_line_give_the_error_of_reading(chat_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*(chat(i, "long " * (i == 3)).encode() for i in range(BLOCK + 9)), b"\xff"]))
    one, other = both_ways(path, chat_tokenizer, max_length=60, overlong="error")
    assert one == other
    assert one[0] == "data-unreadable"


def test_blocks_hold_every_line_once_with_its_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [f"{i}" if i % 7 else "" for i in range(3 * BLOCK)]
    path.write_text("\n".join(lines))
    blocks = LineFile.of(path).blocks
    assert [block.count for block in blocks] == [BLOCK, BLOCK, sum(map(bool, lines)) - 2 * BLOCK]
    assert [line for block in blocks for line in block.lines()] == [
        (text, f"{path}:{number}") for number, text in enumerate(lines, 1) if text
    ]


def test_a_file_that_is_written_to_meanwhile_is_read_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(chat(0))
    file = LineFile.of(path)
    assert file.is_same
    os.utime(path, ns=(1, 1))
    assert not file.is_same


@pytest.mark.parametrize("source", [{"max_rows": 3}, {"columns": {"note": "ignore"}}])
def test_rows_of_which_more_must_be_known_are_read_in_order(source, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(chat(0, note=1))
    assert found(path) is not None
    assert found(path, **source) is None


def test_a_block_with_a_nul_byte_is_refused(tmp_path):
    (tmp_path / "rows").write_bytes(b"a\n\0\n")
    block = LineBlock(path=str(tmp_path / "rows"), offset=0, size=4, first=1, count=2, begins=False)
    with pytest.raises(LinesRefused):
        list(block.lines())


LENGTHS = st.lists(st.lists(st.integers(1, 5), max_size=4), max_size=5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=LENGTHS, divided=st.booleans())
def test_a_set_that_is_joined_as_its_parts_come_is_the_set_of_its_examples(lengths, divided):
    documents = np.array([0]) if divided else None
    parts = [
        [TokenExample(input_ids=np.arange(n, dtype=np.int32), labels=np.full(n, n, np.int32), where=f"{n}", index=n,
                      documents=documents) for n in own] for own in lengths
    ]  # fmt: skip
    joining = JoiningSet()
    for own in parts:
        joining.add(TokenDataset.of(own))
    whole, expected = joining.whole(), TokenDataset.of([example for own in parts for example in own])
    assert (whole.fingerprint, whole.where) == (expected.fingerprint, expected.where)
    assert whole.index.tolist() == expected.index.tolist()


@pytest.fixture(scope="module")
def chat_tokenizer(request):
    return request.getfixturevalue("chat")("chatml")
