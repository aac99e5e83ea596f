"""Streams: the same rows in a shuffled order that a seed decides, resumed anywhere, in bounded memory."""

import gzip
import itertools
import json

import pytest
from luthier.data.batches.row_order import order_rows
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import prepare_data
from luthier.data.stream import row_stream as streams
from luthier.data.stream.stream_feed import StreamFeed
from luthier.errors import LuthierError
from luthier.recipe.schema import Data, Source
from luthier.state_tree import load_state, save_state
from luthier.testing.worlds import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def files(tmp_path):
    """Three files of 20, 11 and 5 rows: JSON Lines, gzipped JSON Lines and CSV under one glob."""
    rows = [{"prompt": f"{i}?", "completion": f"{i}" * (1 + i % 5)} for i in range(36)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:20]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows[20:31])
    (tmp_path / "c.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows[31:])
    )
    return tmp_path


def data_of(folder, **options):
    return Data(train=[Source(path=str(folder / "[abc].*"))], **{"streaming": True, **options})


def feed_of(data, *, batch=4, buffer=8, seed=0, given=None, **limits):
    made = prepare_data(data, TOKENIZER, seed=seed, given=given)
    return StreamFeed(stream=made.train, batch=batch, seed=seed, buffer=buffer, **limits)


def steps(portions):
    return [[example.where for example in portion.examples] for portion in portions]


def tokens(portions):
    return [example.input_ids.tolist() for portion in portions for example in portion.examples]


@pytest.mark.parametrize("buffer", [1, 3, 8, 100])
def test_an_epoch_gives_every_row_once_as_it_is_made_in_memory(files, buffer):
    portions = list(feed_of(data_of(files), buffer=buffer, epochs=1).portions(0))
    whole = prepare_data(data_of(files, streaming=False), TOKENIZER, seed=0).train
    assert sorted(tokens(portions)) == sorted(example.input_ids.tolist() for example in whole)
    assert [len(p.examples) for p in portions] == [4] * 9
    assert [p.last for p in portions] == [False] * 8 + [True]
    assert [p.ends_epoch for p in portions] == [False] * 8 + [True]


def test_the_order_is_a_function_of_the_seed(files):
    one, again = (steps(feed_of(data_of(files), seed=5, epochs=2).portions(0)) for _ in range(2))
    other = steps(feed_of(data_of(files), seed=6, epochs=2).portions(0))
    assert one == again != other
    first, second = one[:9], one[9:]
    assert first != second
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))


def test_without_a_buffer_rows_keep_their_order_and_files_take_turns(files):
    order = order_rows(3, 2, 0).tolist()
    found = list(itertools.chain(*steps(feed_of(data_of(files), buffer=1, seed=2, epochs=1).portions(0))))
    names = [name for name, _ in itertools.groupby(found, lambda where: where.rpartition("/")[2].partition(":")[0])]
    assert names == [["a.jsonl", "b.jsonl.gz", "c.csv"][i] for i in order]
    for _, group in itertools.groupby(found, lambda where: where.rpartition(":")[0]):
        lines = [int(where.rpartition(":")[2]) for where in group]
        assert lines == sorted(lines)


def test_a_row_is_never_drawn_before_the_buffer_could_hold_it(files):
    """Shuffling is as far as the buffer goes: row r comes at draw r - buffer + 1 at the earliest."""
    found = list(itertools.chain(*steps(feed_of(data_of(files), buffer=6, seed=3, epochs=1).portions(0))))
    read = [where for unit in order_rows(3, 3, 0) for where in sorted(
        {w for w in found if f"/{'abc'[unit]}." in w}, key=lambda where: int(where.rpartition(":")[2]))]  # fmt: skip
    moved = [draw - read.index(where) for draw, where in enumerate(found)]
    assert min(moved) >= -5
    assert any(moved)


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        *itertools.product([{}, {"block_size": 16, "format": "text"}], [1, 5, 8, 9, 10, 17]),
        pytest.param({"num_proc": 2}, 8, marks=pytest.mark.slow),  # processes take seconds to start, unless forked
    ],
)
def test_a_feed_that_goes_on_from_its_state_gives_what_the_whole_one_gives(files, tmp_path, options, cut):
    columns = {"text": "completion"} if "block_size" in options else {}
    data = Data(train=[Source(path=str(files / "[abc].*"), columns=columns)], streaming=True, **options)
    limits = {"buffer": 6, "batch": 4, "seed": 1, "epochs": 2}
    whole = feed_of(data, **limits)
    portions = list(whole.portions(0))
    if cut >= len(portions):
        cut = len(portions) - 1
    (tmp_path / "state").mkdir()
    save_state({"feed": whole.state(portions[cut - 1])}, tmp_path / "state")
    fresh = feed_of(data, **limits)
    fresh.load_state(load_state(tmp_path / "state")["feed"])
    rest = list(fresh.portions(cut))
    assert tokens(rest) == tokens(portions[cut:])
    assert steps(rest) == steps(portions[cut:])
    same = [(p.step, p.begun, p.ended, p.ends_epoch, p.last, p.num_supervised) for p in portions[cut:]]
    assert [(p.step, p.begun, p.ended, p.ends_epoch, p.last, p.num_supervised) for p in rest] == same


def test_a_feed_at_its_end_gives_nothing_more(files):
    whole = feed_of(data_of(files), epochs=1)
    *_, last = whole.portions(0)
    fresh = feed_of(data_of(files), epochs=1)
    fresh.load_state(whole.state(last))
    assert list(fresh.portions(last.step + 1)) == []


def test_the_state_of_a_feed_that_has_not_begun_is_its_beginning(files):
    whole = feed_of(data_of(files), epochs=1)
    fresh = feed_of(data_of(files), epochs=1)
    fresh.load_state(whole.state(None))
    assert steps(fresh.portions(0)) == steps(whole.portions(0))


def test_steps_tokens_and_passes_end_a_stream(files):
    assert len(list(feed_of(data_of(files), total=31).portions(0))) == 31  # over three epochs
    portions = list(feed_of(data_of(files), max_tokens=40).portions(0))
    seen = list(itertools.accumulate(p.num_supervised for p in portions))
    assert seen[-2] < 40 <= seen[-1]
    assert [p.last for p in portions] == [False] * (len(portions) - 1) + [True]
    assert len(list(feed_of(data_of(files), total=3, epochs=1).portions(0))) == 3


def test_an_endless_stream_is_read_again_and_again(files):
    portions = list(itertools.islice(feed_of(data_of(files)).portions(0), 30))
    assert [p.step for p in portions if p.ends_epoch] == [8, 17, 26]
    assert not any(p.last for p in portions)
    assert [p.ended for p in portions[:9]] == [0.0] * 8 + [1.0]  # how long an epoch is, is not known yet
    assert portions[11].ended == pytest.approx(1 + 3 / 9)
    assert all(a.ended <= b.ended and b.begun == a.ended for a, b in itertools.pairwise(portions))


def test_a_short_step_ends_an_epoch_whose_rows_do_not_fill_it(files):
    portions = list(feed_of(data_of(files), batch=10, epochs=2).portions(0))
    assert [len(p.examples) for p in portions] == [10, 10, 10, 6] * 2


def endless_rows():
    """A dataset of a million rows that counts how many are alive."""

    class Rows:
        read = 0

        def __iter__(self):
            for i in range(1_000_000):
                Rows.read = i
                yield {"text": f"{i} " * 20}

    return Rows()


def test_memory_holds_the_buffer_and_one_part_however_long_the_stream(files):
    rows = endless_rows()
    feed = feed_of(Data(train=[], streaming=True), given=rows, buffer=50, batch=4, total=300)
    most = 0
    for portion in feed.portions(0):
        most = max(most, len(portion.position.buffer) + len(portion.position.queue))
        drawn = 4 * (portion.step + 1)
        assert rows.read + 1 - drawn <= 50 + 2 * streams.ROWS
    assert most <= 50 + streams.ROWS
    state, held = feed.state(portion), portion.position
    assert [len(state[name]["weights"]) for name in ("buffer", "queue")] == [len(held.buffer), len(held.queue)]


def test_long_rows_are_read_in_smaller_parts(monkeypatch):
    parts = list(streams._parted([streams.Row({"text": "x" * size}, "w") for size in (10, 1 << 20, 5, 5)]))
    assert [len(part) for part in parts] == [2, 2]


def test_max_rows_counts_over_the_files_of_a_source(files):
    data = Data(train=[Source(path=str(files / "[abc].*"), max_rows=23)], streaming=True)
    found = list(itertools.chain(*steps(feed_of(data, epochs=1).portions(0))))
    assert len(found) == 23
    assert sum("/b." in where for where in found) == 3


def test_columns_and_formats_of_each_source_are_its_own(files, tmp_path):
    (tmp_path / "d.txt").write_text("one\n\ntwo\n")
    sources = [
        Source(path=str(files / "c.csv"), columns={"text": "prompt"}, max_rows=2),
        Source(path=str(tmp_path / "d.txt")),
    ]
    made = prepare_data(Data(train=sources, streaming=True, text_unit="line"), TOKENIZER, seed=0)
    assert made.report.format == "text"
    assert {form for _, form in made.train.units} == {"text"}
    mixed = [Source(path=str(files / "a.jsonl")), Source(path=str(tmp_path / "d.txt"))]
    made = prepare_data(Data(train=mixed, streaming=True), TOKENIZER, seed=0)
    assert made.report.format == "prompt_completion, text"
    feed = StreamFeed(stream=made.train, batch=50, seed=0, buffer=50, epochs=1)
    (portion,) = feed.portions(0)
    assert len(portion.examples) == 22


@pytest.mark.parametrize("processes", [None, 2])
def test_a_broken_row_is_named_when_it_is_reached(files, processes):
    with (files / "c.csv").open("a") as file:
        file.write("one,two,three\n")
    feed, seen = feed_of(data_of(files, num_proc=processes), epochs=1, seed=5, buffer=1), []
    with pytest.raises(LuthierError) as caught:
        for portion in feed.portions(0):
            seen += portion.examples
    assert caught.value.where == f"{files}/c.csv:7"
    before = order_rows(3, 5, 0).tolist().index(2)
    assert len(seen) >= [0, 4, 28][before]  # whatever was read before it


def test_dropped_rows_are_counted_and_told_at_the_epochs_end(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "completion": "c" * (i % 4)}) + "\n" for i in range(40)))
    data = Data(train=[Source(path=str(path))], streaming=True, unsupervised="drop")
    portions = list(feed_of(data, epochs=1).portions(0))
    assert sum(len(p.examples) for p in portions) == 30
    assert portions[3].position.drops == {"unsupervised": 10}


def test_a_stream_of_which_no_row_is_left_says_so(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": ""}\n' * 9)
    data = Data(train=[Source(path=str(path))], streaming=True, unsupervised="drop")
    with pytest.raises(LuthierError) as caught:
        list(feed_of(data).portions(0))
    assert caught.value.code == "data-empty"
    assert "unsupervised" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda folder: None, False),
        (lambda folder: (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text()), False),
        (lambda folder: (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text().replace("19?", "91?")), True),
        (lambda folder: (folder / "b.jsonl.gz").unlink(), True),
        (lambda folder: (folder / "c.csv").write_text((folder / "c.csv").read_text() + "x,y\n"), True),
    ],
)
def test_a_stream_is_known_again_by_its_files(files, change, differs):
    before = feed_of(data_of(files)).stream.fingerprint
    change(files)
    assert (feed_of(data_of(files)).stream.fingerprint != before) == differs


def test_a_stream_is_another_with_other_options_or_another_tokenizer(files):
    prints = {feed_of(data_of(files, **o)).stream.fingerprint for o in ({}, {"max_length": 9}, {"train_on": "all"})}
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    prints.add(prepare_data(data_of(files), tokenizer, seed=0).train.fingerprint)
    assert len(prints) == 4
    reading = feed_of(data_of(files, shuffle_buffer=3, num_proc=2, cache=False)).stream.fingerprint
    assert reading in prints


@pytest.mark.parametrize(
    ("options", "given", "code", "where"),
    [
        ({"validation": 0.1}, None, "recipe-conflict", "data.validation"),
        ({}, iter([{"text": "a"}]), "data-format", "data"),
        ({"block_size": 8}, [{"prompt": "a", "completion": "b"}], "recipe-conflict", "data.block_size"),
        ({}, [{"chosen": "a b", "rejected": "a c"}], "data-format", "data"),
        ({}, [], "data-empty", "data"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_with_what_to_do(options, given, code, where):
    data = Data(train=[Source(path="rows.jsonl")] if given is None else [], streaming=True, **options)
    with pytest.raises(LuthierError) as caught:
        prepare_data(data, TOKENIZER, seed=0, given=given)
    assert (caught.value.code, caught.value.where) == (code, where)
    assert caught.value.remedy


def test_validation_rows_of_a_stream_are_held_in_memory(files):
    data = Data(
        train=[Source(path=str(files / "a.jsonl"))], validation=[Source(path=str(files / "c.csv"))], streaming=True
    )
    prepared = prepare_data(data, TOKENIZER, seed=0)
    assert len(prepared.validation) == 5
    assert prepared.report.validation.rows == 5
    assert prepared.report.rows == 20
    assert "the first 20" in prepared.report.warnings[0]


def test_datasets_of_python_are_streamed(files):
    import datasets

    rows = [{"text": f"row {i}"} for i in range(12)]
    for given in (rows, datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        found = tokens(feed_of(Data(train=[], streaming=True), given=given, epochs=1).portions(0))
        assert len(found) == 12


def test_looking_at_a_stream_reads_only_its_beginning():
    from luthier.data.inspect_examples import inspect

    rows = endless_rows()
    prepared = prepare_data(Data(train=[], streaming=True), TOKENIZER, seed=0, given=rows)
    found = inspect(prepared, TOKENIZER, 2)
    assert len(found.examples) == 2
    assert found.report.rows == 100
    assert rows.read < 200


PAIRED = Wanted(kind="preference", columns={"margin": "float"})


def pair_rows(count, begin=0):
    return [
        {"prompt": f"q{i}", "chosen": "a" * (1 + i % 4), "rejected": "b" * (1 + i % 3), "margin": i}
        for i in range(begin, begin + count)
    ]


def test_streamed_pairs_are_those_of_rows_in_memory_and_go_on_from_any_state(tmp_path):
    for name in ("a", "b"):
        lines = [json.dumps(row) + "\n" for row in pair_rows(9, 9 * (name == "b"))]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = [Source(path=str(tmp_path / "*.jsonl"))]
    whole = prepare_data(Data(train=sources, cache=False), TOKENIZER, seed=0, wanted=PAIRED).train
    stream = prepare_data(Data(train=sources, streaming=True), TOKENIZER, seed=0, wanted=PAIRED).train
    settings = {"stream": stream, "batch": 4, "seed": 0, "buffer": 5, "epochs": 2}
    portions = list(StreamFeed(**settings).portions(0))
    first = [e for p in portions[: len(portions) // 2] for e in p.examples]
    read = {e.columns["margin"]: e for e in first}
    assert sorted(read) == [e.columns["margin"] for e in whole] and len(first) == len(whole)
    for example in whole:
        other = read[example.columns["margin"]]
        assert other.names == example.names == ("chosen", "rejected")
        assert (
            other.input_ids.tolist() == example.input_ids.tolist() and other.starts.tolist() == example.starts.tolist()
        )
    assert len({e.index for e in first}) == len(whole)
    again = StreamFeed(**settings)
    (tmp_path / "state").mkdir()
    save_state({"feed": again.state(portions[2])}, tmp_path / "state")
    again.load_state(load_state(tmp_path / "state")["feed"])
    for one, other in zip(portions[3:], again.portions(3), strict=True):
        assert [(e.index, e.names, dict(e.columns)) for e in one.examples] == [
            (e.index, e.names, dict(e.columns)) for e in other.examples
        ]


def test_an_epoch_counts_what_the_template_leaves_out_also_after_a_resume(capsys, tmp_path):
    from luthier.logs import set_up

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": said[i % 2 :]} for i in range(10)]
    data = Data(train=[Source(path="rows")], streaming=True, unrendered="warn")
    stream = prepare_data(data, tokenizer, seed=0, given=rows).train

    def feed():
        return StreamFeed(stream=stream, batch=3, seed=0, buffer=2, epochs=1)

    set_up("info")
    whole = feed()
    first = next(whole.portions(0))
    (tmp_path / "state").mkdir()
    save_state({"feed": whole.state(first)}, tmp_path / "state")
    again = feed()
    again.load_state(load_state(tmp_path / "state")["feed"])
    list(again.portions(1))
    set_up("warning")
    assert "system 5" in capsys.readouterr().err
