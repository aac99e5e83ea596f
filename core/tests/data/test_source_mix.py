"""Mixing: each source is the part of an epoch that it is asked to be, to the row, in the same way every time."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError, Recipe
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.prepare import prepare_data
from luthier.data.source_shares import count_rows, is_mixed
from luthier.data.stream.source_lines import FILE_ROWS, Place, make_lines
from luthier.data.stream.source_turns import Turn, Turns
from luthier.data.stream.stream_feed import StreamFeed
from luthier.recipe.schema import Data, Source
from luthier.state_tree import load_state, save_state
from luthier.testing import expect_error

QUIET = settings(max_examples=40, deadline=None)


@pytest.fixture
def files(tmp_path):
    """Three files of 40, 10 and 6 rows."""
    for name, count in (("a", 40), ("b", 10), ("c", 6)):
        lines = [json.dumps({"text": f"{name}{i:02}"}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def data_of(files, options, **others):
    sources = [Source(path=str(files / f"{name}.jsonl"), **own) for name, own in options.items()]
    return Data(train=sources, cache=False, **others)


def run(files, tokenizer, options, *, seed=0, **others):
    return prepare_data(data_of(files, options, **others), tokenizer, seed=seed)


def counts(prepared):
    """The rows of each file that an epoch has."""
    return Counter(example.where.rpartition("/")[2][0] for example in prepared.train)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"a": {}, "b": {"repeat": 3}}, {"a": 40, "b": 30}),
        ({"a": {}, "b": {"share": 0.2}}, {"a": 40, "b": 10}),
        ({"a": {}, "b": {"share": 0.1}}, {"a": 40, "b": 4}),
        ({"a": {}, "b": {"share": 0.5}}, {"a": 40, "b": 40}),
        ({"a": {"share": 0.5}, "b": {"share": 0.5}}, {"a": 10, "b": 10}),
        ({"a": {"share": 0.5}, "b": {"share": 0.5, "repeat": 3}}, {"a": 30, "b": 30}),
        ({"a": {"share": 0.8}, "b": {"share": 0.2}}, {"a": 40, "b": 10}),
        ({"a": {"share": 0.5, "max_rows": 4}, "b": {}, "c": {"share": 0.25}}, {"a": 20, "b": 10, "c": 10}),
        ({"a": {"repeat": 2}}, {"a": 80}),
    ],
)
def test_an_epoch_has_so_many_rows_of_each_source(options, expected, files, chat):
    prepared = run(files, chat(None), options)
    assert counts(prepared) == expected
    if len(options) > 1:
        assert {s["path"][-7]: s["epoch_rows"] for s in prepared.report.sources} == expected
        assert sum(s["share"] for s in prepared.report.sources) == pytest.approx(1)
    assert prepared.report.examples == sum(expected.values())
    times = Counter(example.where for example in prepared.train)
    for name in options:
        own = [count for where, count in times.items() if where.rpartition("/")[2][0] == name]
        rows = next((s["rows"] for s in prepared.report.sources if s["path"][-7] == name), 40)
        own += [0] * (rows - len(own))
        assert max(own) - min(own) <= 1


SOURCES = st.lists(
    st.tuples(st.integers(1, 500), st.integers(1, 3), st.sampled_from([None, 0.05, 0.1, 0.25])), min_size=2, max_size=3
)


@QUIET
@given(drawn=SOURCES)
def test_shares_hold_to_a_row_and_what_has_none_comes_whole(drawn):
    if all(share is not None for *_, share in drawn):
        drawn = [(rows, repeat, None if i == 0 else share) for i, (rows, repeat, share) in enumerate(drawn)]
    sources = [Source(path=str(i), repeat=repeat, share=share) for i, (_, repeat, share) in enumerate(drawn)]
    rows = [count for count, *_ in drawn]
    try:
        found = count_rows(sources, rows)
    except LuthierError as error:
        assert error.code == "recipe-out-of-range"
        return
    for count, source, own in zip(found, sources, rows, strict=True):
        if source.share is None:
            assert count == own * source.repeat
        else:
            assert abs(count - source.share * sum(found)) <= len(found)


def test_what_is_drawn_is_a_function_of_the_seed(files, chat):
    options = {"a": {"share": 0.5}, "b": {}}
    one, again, other = (run(files, chat(None), options, seed=seed).train for seed in (0, 0, 1))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert {*one.where} != {*other.where} and len(one) == len(other) == 20


def test_shares_count_the_rows_that_are_left_and_keep_their_numbers(files, chat):
    path = files / "b.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": ""}) + "\n" + "{\n")
    prepared = run(files, chat(None), {"b": {"share": 0.5}, "c": {}}, bad_rows="drop")
    assert counts(prepared) == {"b": 6, "c": 6} and prepared.report.drops == {"unsupervised": 1, "broken": 1}
    assert all(
        e.index == int(e.where.rpartition(":")[2]) - 1 + (12 if "c.jsonl" in e.where else 0) for e in prepared.train
    )


def test_the_share_of_the_rows_for_validation_comes_first(files, chat):
    prepared = run(files, chat(None), {"a": {}, "b": {"repeat": 2}}, validation=0.2)
    held = {example.where for example in prepared.validation}
    assert len(held) == 10 and not held & {*prepared.train.where}
    assert len(prepared.train) == 40 - sum("a.jsonl" in w for w in held) + 2 * (10 - sum("b.jsonl" in w for w in held))


def test_blocks_are_cut_from_mixed_documents(files, chat):
    whole = run(files, chat(None), {"a": {}, "b": {"repeat": 2}}, block_size=7).train
    assert len(whole.input_ids) == 60 * 5


def test_several_sources_are_counted_though_none_has_a_share(files, chat):
    prepared = run(files, chat(None), {"a": {}, "b": {}})
    assert [(s["rows"], s["epoch_rows"]) for s in prepared.report.sources] == [(40, 40), (10, 10)]
    assert run(files, chat(None), {"a": {}}).report.sources == []


def test_a_source_that_comes_again_for_its_share_is_told(files, chat):
    told = run(files, chat(None), {"a": {}, "b": {"share": 0.5}}).report.warnings
    assert any("come 4.0 times in an epoch" in warning for warning in told)


@pytest.mark.parametrize(
    ("options", "others", "code"),
    [
        ({"a": {"share": 0.5}, "b": {"share": 0.6}}, {}, "recipe-out-of-range"),
        ({"a": {"share": 0.5}}, {}, "recipe-out-of-range"),
        ({"a": {"share": 0.5}, "b": {"share": 0.5}, "c": {}}, {}, "recipe-out-of-range"),
        ({"a": {}, "b": {"share": 0.001}}, {}, "recipe-out-of-range"),
        ({"a": {"share": 0.5}, "b": {"share": 0.6}}, {"streaming": True}, "recipe-out-of-range"),
    ],
)
def test_shares_that_cannot_be_are_refused(options, others, code, files, chat):
    with pytest.raises(LuthierError) as caught:
        run(files, chat(None), options, **others)
    assert caught.value.code == code


def test_validation_rows_are_not_mixed(files, chat):
    held = [Source(path=str(files / "b.jsonl"), repeat=2)]
    with expect_error("recipe-conflict", "data.validation"):
        run(files, chat(None), {"a": {}}, validation=held)


def test_a_stream_repeats_a_source_in_every_epoch_and_goes_on_where_it_was(files, chat):
    stream = run(files, chat(None), {"b": {"repeat": 3}, "c": {}}, streaming=True).train

    def feed():
        return StreamFeed(stream=stream, batch=4, seed=0, buffer=8, epochs=2)

    whole = list(feed().portions(0))
    first = Counter(e.where.rpartition("/")[2][0] for p in whole[:9] for e in p.examples)
    assert first == {"b": 30, "c": 6} and whole[8].ends_epoch
    again = feed()
    again.load_state(feed().state(whole[4]))
    assert [[e.where for e in p.examples] for p in again.portions(5)] == [
        [e.where for e in p.examples] for p in whole[5:]
    ]


MIXES = [
    {"a": {}, "b": {"share": 0.2}},
    {"a": {}, "c": {"share": 0.3}},
    {"a": {"share": 0.5}, "b": {"share": 0.5}},
    {"a": {"share": 0.5}, "b": {"share": 0.5, "repeat": 3}},
    {"a": {"share": 0.9}, "c": {"share": 0.1, "repeat": 2}},
    {"a": {"share": 0.5, "max_rows": 4}, "b": {}, "c": {"share": 0.25}},
    {"a": {"share": 0.1}, "b": {"repeat": 2}, "c": {}},
]


def stream_feed(files, tokenizer, options, *, batch=4, buffer=1, **others):
    stream = run(files, tokenizer, options, streaming=True, **others).train
    return StreamFeed(stream=stream, batch=batch, seed=0, buffer=buffer, epochs=2)


@pytest.mark.parametrize("options", MIXES)
def test_an_epoch_of_a_stream_has_the_rows_that_it_would_have_in_memory(options, files, chat):
    whole = run(files, chat(None), options)
    feed = stream_feed(files, chat(None), options, batch=1)
    taken = [portion.examples[0].where for portion in feed.portions(0)]
    assert len(taken) == 2 * len(whole.train)
    first = Counter(where.rpartition("/")[2][0] for where in taken[: len(whole.train)])
    assert first == counts(whole)
    assert {s["path"][-7]: s["epoch_rows"] for s in feed.stream.report.sources} == first
    assert [s["share"] for s in feed.stream.report.sources] == [s["share"] for s in whole.report.sources]
    times = Counter(taken[: len(whole.train)])
    for name, own in options.items():
        often = [count for where, count in times.items() if where.rpartition("/")[2][0] == name]
        most = own.get("repeat", 1) if "share" not in own or all("share" in o for o in options.values()) else None
        assert max(often) <= (most or -(-first[name] // len(often)))


def turns_of(sources, rows, parts=5):
    """The turns of sources that have so many rows, each row one token, read in parts of five."""
    lines = make_lines(sources, [1] * len(sources))
    turns = [Turn() for _ in lines]

    def fetch(number):
        line, turn = lines[number], turns[number]
        unit, row, times = turn.place.unit, turn.place.row, turn.place.times
        if unit < len(line.units) and row == rows[line.units[unit]]:
            unit, row = unit + 1, 0
        if unit == len(line.units):
            unit, times = 0, times + 1
        if times == line.passes:
            return None
        count = min(parts, rows[line.units[unit]] - row)
        turn.place = Place(unit, row + count, times)
        index = line.units[unit] * FILE_ROWS + row
        token = np.zeros(1, np.int32)
        return TokenDataset.of([TokenExample(input_ids=token, labels=token, index=index + i) for i in range(count)])

    return Turns(lines=lines, turns=turns, fetch=fetch, taken=Counter())


@QUIET
@given(drawn=SOURCES, whole=st.booleans())
def test_turns_take_as_many_rows_of_each_source_as_an_epoch_in_memory_has(drawn, whole):
    if whole:  # every source has a share
        drawn = [(rows, repeat, 1 / len(drawn)) for rows, repeat, _ in drawn]
    elif all(share is not None for *_, share in drawn):
        drawn = [(rows, repeat, None if i == 0 else share) for i, (rows, repeat, share) in enumerate(drawn)]
    sources = [Source(path=str(i), repeat=repeat, share=share) for i, (_, repeat, share) in enumerate(drawn)]
    rows = [count for count, *_ in drawn]
    turns = turns_of(sources, rows)
    while turns.take() is not None:
        pass
    if not is_mixed(sources) or len(turns.lines) == 1:
        assert sum(turns.taken.values()) == sum(
            count * source.repeat for count, source in zip(rows, sources, strict=True)
        )
        return
    try:
        expected = count_rows(sources, rows)
    except LuthierError:  # a share of less than one row, which a stream cannot know
        assert not all(turns.taken[str(i)] for i in range(len(sources)))
        return
    assert [turns.taken[str(i)] for i in range(len(sources))] == expected


@pytest.mark.parametrize(("option", "value"), [("repeat", 10**30), ("repeat", 10**7), ("max_rows", 10**30)])
def test_numbers_that_no_source_can_mean_are_refused(option, value, files):
    data = {"train": [{"path": str(files / "a.jsonl"), option: value}]}
    with expect_error("recipe-out-of-range", option):
        Recipe.load({"model": "demo", "data": data})


@pytest.mark.parametrize("options", MIXES)
def test_a_stream_has_its_shares_at_every_point_of_an_epoch(options, files, chat):
    feed, taken = stream_feed(files, chat(None), options, batch=1), Counter()
    shares = {name: own["share"] for name, own in options.items() if "share" in own}
    for number, portion in enumerate(feed.portions(0), 1):
        taken[portion.examples[0].where.rpartition("/")[2][0]] += 1
        assert all(abs(taken[name] - share * number) <= 1 for name, share in shares.items())
        if portion.ends_epoch:
            break


@pytest.mark.parametrize("options", [*MIXES[1::3], {"a": {}, "b": {"share": 0.4}, "c": {"share": 0.1}}])
@pytest.mark.parametrize(
    "others",
    [
        {},
        {"block_size": 7},
        pytest.param({"num_proc": 2}, marks=pytest.mark.slow),  # processes take seconds to start, unless forked
    ],
)
def test_a_mixed_stream_goes_on_where_it_was(options, others, files, tmp_path, chat):
    def told(portions):
        return [[(e.where, e.input_ids.tolist()) for e in portion.examples] for portion in portions]

    whole = list(stream_feed(files, chat(None), options, buffer=5, **others).portions(0))
    for cut in (1, len(whole) // 2 - 1, len(whole) // 2, len(whole) - 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        save_state({"feed": stream_feed(files, chat(None), options).state(whole[cut - 1])}, folder)
        again = stream_feed(files, chat(None), options, buffer=5, **others)
        again.load_state(load_state(folder)["feed"])
        assert told(again.portions(cut)) == told(whole[cut:])


def test_shares_of_a_stream_count_the_rows_that_are_left(files, chat):
    path = files / "b.jsonl"
    path.write_text('{"text": ""}\n{\n' + path.read_text())
    options = {"b": {"share": 0.25}, "a": {}}
    whole = run(files, chat(None), options, bad_rows="drop")
    feed = stream_feed(files, chat(None), options, bad_rows="drop")
    assert {s["path"][-7]: s["epoch_rows"] for s in whole.report.sources} == {"a": 40, "b": 13}
    list(feed.portions(0))
    assert {s["path"][-7]: s["epoch_rows"] for s in feed.stream.report.sources} == {"a": 40, "b": 13}


def test_a_source_of_a_stream_of_which_no_row_is_left_has_no_share(files, chat):
    (files / "b.jsonl").write_text('{"text": ""}\n' * 3)
    feed = stream_feed(files, chat(None), {"a": {}, "b": {"share": 0.5}}, unsupervised="drop")
    with expect_error("data-empty", "b.jsonl"):
        list(feed.portions(0))


def test_a_checkpoint_of_a_stream_without_turns_goes_on(files, chat):
    whole = list(stream_feed(files, chat(None), {"a": {}}, buffer=5).portions(0))
    state = stream_feed(files, chat(None), {"a": {}}).state(whole[4])
    ((unit, row, *_),) = state.pop("turns")
    again = stream_feed(files, chat(None), {"a": {}}, buffer=5)
    again.load_state({**state, "place": [unit, row]})
    assert [[e.where for e in p.examples] for p in again.portions(5)] == [
        [e.where for e in p.examples] for p in whole[5:]
    ]


def test_a_subset_is_the_name_of_a_hub_datasets_configuration():
    for written in (
        {"path": "org/set", "subset": "main", "split": "test"},
        {"path": "org/set", "name": "main", "split": "test"},
    ):
        for data in ({"train": [written]}, written):
            (source,) = Recipe.load({"model": "demo", "data": data}).data.train
            assert (source.name, source.split) == ("main", "test")
    with pytest.raises(LuthierError) as caught:
        Recipe.load({"model": "demo", "data": {"train": [{"path": "org/set", "subset": "a", "name": "b"}]}})
    assert caught.value.code == "recipe-unknown-option"
