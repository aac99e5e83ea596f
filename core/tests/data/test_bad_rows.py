"""Bad rows: all of them are told at once, or dropped and counted, whatever is wrong with them and wherever it is met."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.formats.bad_rows import KINDS, TOLD
from luthier.data.prepare import prepare_data
from luthier.data.stream.stream_feed import StreamFeed
from luthier.recipe.schema import Data, Source
from luthier.testing import expect_error

QUIET = settings(max_examples=25, deadline=None)
REFUSING = (
    "{% for m in messages %}{% if m.content == 'raise' %}{{ raise_exception('no such thing') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ 'other' if m.content == 'hide' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(answer="fine", **columns):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}], **columns}


GOOD = json.dumps(talk())
BAD = {  # a line of a file, and what it is counted as
    "no_json": ('{"messages": [', "broken"),
    "no_object": ("5", "broken"),
    "two_objects": (f"{GOOD} {GOOD}", "broken"),
    "no_list": (json.dumps({"messages": "a"}), "broken"),
    "no_role": (json.dumps({"messages": [{"role": "asistant", "content": "a"}]}), "broken"),
    "refused": (json.dumps(talk("raise")), "broken"),
    "no_messages": (json.dumps({"messages": []}), "empty"),
    "null": (json.dumps({"messages": None, "id": 5}), "empty"),
    "nothing": ("{}", "empty"),
    "no_answer": (json.dumps({"messages": talk()["messages"][:1]}), "unsupervised"),
    "silent": (json.dumps(talk("")), "unsupervised"),
    "hidden": (json.dumps(talk("hide")), "unprovable"),
    "avoided": (json.dumps(talk(label=False)), "avoided"),
    "pictured": (json.dumps(talk(images=["1.jpg"])), "column"),
}


def written(tmp_path, lines, name="a.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


def run(path, tokenizer, **options):
    data = Data(train=[Source(path=str(path))], chat_template=REFUSING, cache=False, **options)
    return prepare_data(data, tokenizer, seed=0)


def refused(path, tokenizer, **options):
    with pytest.raises(LuthierError) as caught:
        run(path, tokenizer, **options)
    return caught.value


def counted(error):
    """The numbers in an error's first line: of the bad rows, of all rows, and of each kind."""
    return [int(number) for number in re.findall(r"\d+", error.problem.partition("\n")[0])]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("streaming", [False, True])
def test_nobody_is_told_to_drop_rows_where_none_would_be_left(name, streaming, tmp_path, chat):
    error = refused(written(tmp_path, [BAD[name][0]] * 3), chat("chatml"), streaming=streaming)
    assert ": drop" not in error.remedy


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_is_told_with_its_lines_or_dropped_and_counted(name, streaming, tmp_path, chat):
    line, kind = BAD[name]
    path = written(tmp_path, [GOOD, line, GOOD, line, GOOD])
    error = refused(path, chat("chatml"), streaming=streaming)
    assert error.where.startswith(f"{path}:2") and error.code in KINDS
    assert counted(error) == [2, 5, 2] and kind in error.problem and "bad_rows: drop" in error.remedy
    assert f"\n  {path}:2" in error.problem and error.problem.endswith(f": {path}:4")
    prepared = run(path, chat("chatml"), streaming=streaming, bad_rows="drop")
    assert prepared.report.drops == {kind: 2} and prepared.report.rows == 5
    assert [line.partition(": ")[0] for line in prepared.report.bad_rows] == [f"{path}:2", f"{path}:4"]
    examples = prepared.train.head(9)
    assert [example.where for example in examples] == [f"{path}:{number}" for number in (1, 3, 5)]
    assert [example.index for example in examples] == [0, 2, 4]
    assert prepared.report.to_dict()["drops"] == {kind: 2}


@QUIET
@given(names=st.lists(st.sampled_from([None, *BAD]), min_size=2, max_size=30), processes=st.sampled_from([1, 2]))
def test_the_error_counts_all_and_lists_each_problem_with_its_first_row(names, processes, tmp_path_factory, chat):
    lines = [GOOD if name is None else BAD[name][0] for name in [None, *names]]
    path = written(tmp_path_factory.mktemp("rows"), lines)
    bad = [(number, BAD[name][1]) for number, name in enumerate(names, 2) if name is not None]
    kinds = Counter(kind for _, kind in bad)
    if len(bad) > 1:
        error = refused(path, chat("chatml"), num_proc=processes, format="messages")
        assert counted(error)[:2] == [len(bad), len(lines)]
        assert all(f"{count} {kind}" in error.problem.partition("\n")[0] for kind, count in kinds.items())
        told = [line for line in error.problem.splitlines() if line.startswith(f"  {path}:")]
        numbers = [int(line.split(":")[1]) for line in told]
        assert numbers[0] == bad[0][0] and numbers == sorted(set(numbers) & {number for number, _ in bad})
        assert len(told) <= TOLD and all(told.count(line) == 1 for line in told)
        alike = [int(count) for count in re.findall(r"and (\d+) more", error.problem)]
        assert sum(alike) + len(told) == len(bad)
    prepared = run(path, chat("chatml"), num_proc=processes, format="messages", bad_rows="drop")
    assert prepared.report.drops == kinds and prepared.report.examples == len(lines) - len(bad)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("limit", "passes"), [(2, True), (1, False), (0, False), (0.5, True), (0.4, True), (0.39, False)]
)
def test_more_bad_rows_than_the_limit_are_an_error(limit, passes, streaming, tmp_path, chat):
    path = written(tmp_path, [GOOD, BAD["no_json"][0], GOOD, BAD["silent"][0], GOOD])
    options = {"bad_rows": "drop", "max_bad_rows": limit, "streaming": streaming}
    if passes:
        assert run(path, chat("chatml"), **options).report.drops == {"broken": 1, "unsupervised": 1}
        return
    error = refused(path, chat("chatml"), **options)
    assert f"max_bad_rows: {limit}" in error.problem and f"{path}:2" in error.problem


def test_a_stream_of_too_many_bad_rows_ends_where_it_is_known(tmp_path, chat):
    path = written(tmp_path, [GOOD] * 150 + [BAD["silent"][0]] * 50 + [GOOD] * 100)
    for limit, ends in ((49, True), (0.1, True), (50, False), (0.2, False)):
        stream = run(path, chat("chatml"), streaming=True, bad_rows="drop", max_bad_rows=limit).train
        feed = StreamFeed(stream=stream, batch=8, seed=0, buffer=8, epochs=1)
        if ends:
            with expect_error("data-row", "data.train", "max_bad_rows"):
                list(feed.portions(0))
        else:
            assert sum(len(portion.examples) for portion in feed.portions(0)) == 250


def test_a_stream_with_bad_rows_goes_on_where_it_was(tmp_path, chat):
    path = written(tmp_path, [GOOD.replace("fine", f"a{i}") if i % 5 else BAD["no_json"][0] for i in range(200)])
    stream = run(path, chat("chatml"), streaming=True, bad_rows="drop", max_bad_rows=40).train

    def feed():
        return StreamFeed(stream=stream, batch=7, seed=3, buffer=16, epochs=2)

    def told(portions):
        return [[example.where for example in portion.examples] for portion in portions]

    whole = list(feed().portions(0))
    second = feed()
    second.load_state(feed().state(whole[9]))
    assert told(second.portions(10)) == told(whole[10:])
    assert second.begin.bad == whole[9].position.bad > 0


def test_an_explicit_unsupervised_wins_for_its_kind(tmp_path, chat):
    path = written(tmp_path, [GOOD, BAD["silent"][0], BAD["no_json"][0]])
    error = refused(path, chat("chatml"), bad_rows="drop", unsupervised="error")
    assert (error.code, error.where) == ("data-unsupervised", f"{path}:2")
    error = refused(path, chat("chatml"), unsupervised="drop")
    assert (error.code, error.where) == ("data-row", f"{path}:3")
    kept = run(path, chat("chatml"), unsupervised="drop", bad_rows="drop", max_bad_rows=1)
    assert kept.report.drops == {"unsupervised": 1, "broken": 1} and len(kept.report.bad_rows) == 1


def test_an_overlong_row_is_no_bad_row(tmp_path, chat):
    path = written(tmp_path, [GOOD, json.dumps(talk("long " * 40))])
    error = refused(path, chat("chatml"), bad_rows="drop", overlong="error", max_length=60)
    assert error.code == "data-overlong"
    kept = run(path, chat("chatml"), bad_rows="drop", max_bad_rows=0, max_length=60)
    assert kept.report.drops == {"overlong": 1} and not kept.report.bad_rows


def test_one_bad_row_is_told_as_if_it_were_alone(tmp_path, chat):
    path = written(tmp_path, [GOOD, BAD["no_role"][0], GOOD])
    error = refused(path, chat("chatml"))
    assert (error.code, error.where) == ("data-row", f"{path}:2: messages[0].role")
    assert error.problem == "no such role" and "Did you mean 'assistant'" in error.remedy


def test_rows_of_csv_and_of_python_are_told_and_dropped_alike(tmp_path, chat):
    path = written(tmp_path, ["prompt,completion", "a,b", "a", "a,b,c", "a,d"], "a.csv")
    error = refused(path, chat("chatml"))
    assert (error.code, counted(error)) == ("data-row", [2, 4, 2])
    assert run(path, chat("chatml"), bad_rows="drop").report.examples == 2
    rows = [talk(), 5, talk(), None]
    data = Data(train=[Source(path="data")], bad_rows="drop")
    assert prepare_data(data, chat("chatml"), seed=0, given=rows).report.drops == {"broken": 2}


def test_a_column_that_some_rows_lack_makes_them_bad_and_one_that_all_lack_is_told_once(tmp_path, chat):
    rows = [{"q": "a", "a": "b"}, {"q": "a"}, {"a": "b"}, {"q": "c", "a": "d"}]
    source = Source(path="data", columns={"prompt": "q", "completion": "a"})
    kept = prepare_data(Data(train=[source], bad_rows="drop"), chat("chatml"), seed=0, given=rows)
    assert kept.report.drops == {"column": 2} and kept.report.examples == 2
    with expect_error("data-column", "data[0]", "4") as caught:
        other = Source(path="data", columns={"prompt": "qq", "completion": "a"})
        prepare_data(Data(train=[other], bad_rows="drop"), chat("chatml"), seed=0, given=rows)
    assert caught.value.code == "data-column"


def test_bad_rows_stay_out_of_the_share_for_validation(tmp_path, chat):
    path = written(tmp_path, [GOOD, *[BAD["no_json"][0], GOOD] * 5])
    prepared = run(path, chat("chatml"), bad_rows="drop", validation=0.5)
    assert (prepared.report.rows, prepared.report.examples) == (8, 3)
    assert (prepared.report.validation.rows, prepared.report.validation.examples) == (3, 3)


@pytest.mark.parametrize(
    ("options", "code"),
    [({"max_bad_rows": 3}, "recipe-conflict"), ({"bad_rows": "drop", "max_bad_rows": 1.5}, "recipe-out-of-range")],
)
def test_a_limit_that_nothing_reads_is_refused(options, code, tmp_path, chat):
    error = refused(written(tmp_path, [GOOD]), chat("chatml"), **options)
    assert (error.code, error.where) == (code, "data.max_bad_rows")


def test_a_set_of_which_nothing_is_left_says_what_was_dropped(tmp_path, chat):
    path = written(tmp_path, [BAD["silent"][0], BAD["avoided"][0]])
    error = refused(path, chat("chatml"), bad_rows="drop")
    assert error.code == "data-empty" and "unsupervised: 1" in error.problem and "avoided: 1" in error.problem
