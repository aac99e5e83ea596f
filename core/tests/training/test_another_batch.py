"""Another batch on resume: positions count samples, so that every row of the epochs is trained on exactly once."""

import itertools
import json
from collections import Counter

import hypothesis.strategies as st
import luthier
import numpy as np
import pytest
from hypothesis import given, settings
from luthier.checkpoint import folder as checkpoint
from luthier.data.batches.example_feed import Reached
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.prepare import prepare_data
from luthier.data.stream.stream_feed import StreamFeed
from luthier.errors import LuthierError
from luthier.recipe import Recipe
from luthier.recipe.schema import Data, Source
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.step.schedule.schedule_pace import resume_pace
from luthier.step.schedule.total_steps import feed_of
from luthier.testing.worlds import tiny_tokenizer

COUNTS = {"rows": st.integers(1, 30), "epochs": st.integers(1, 4), "before": st.integers(1, 12),
          "after": st.integers(1, 12), "cut": st.integers(0, 40)}  # fmt: skip


def rows_in_memory(count, supervised=1):
    rows = [np.arange(supervised + 1) for _ in range(count)]
    examples = [TokenExample(input_ids=row, labels=row, where=f"rows:{i}") for i, row in enumerate(rows)]
    return TokenDataset.of(examples)


def recipe_of(batch, **limits):
    return Recipe.from_dict({"model": "demo", "data": "rows.jsonl", "global_batch_size": batch, **limits})


def cut_and_go_on(feeds, cut):
    """The portions of a feed up to step `cut`, and those of another with another batch from there on."""
    first, second = feeds
    done = list(itertools.islice(first.portions(0), cut))
    samples = sum(len(portion.examples) for portion in done)
    reached = Reached(step=len(done), samples=samples, batch=first.order.batch if hasattr(first, "order") else None)
    second.load_state(first.state(done[-1] if done else None), reached)
    return done, list(second.portions(len(done)))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(**COUNTS)
def test_every_row_comes_exactly_as_often_as_there_are_epochs(rows, epochs, before, after, cut):
    dataset = rows_in_memory(rows)
    feeds = [feed_of(recipe_of(batch, num_train_epochs=epochs), dataset) for batch in (before, after)]
    done, rest = cut_and_go_on(feeds, cut)
    seen = Counter(example.where for portion in [*done, *rest] for example in portion.examples)
    assert seen == Counter({f"rows:{i}": epochs for i in range(rows)})
    assert [portion.step for portion in [*done, *rest]] == list(range(len(done) + len(rest)))
    assert feeds[1].total == len(done) + len(rest)
    assert [portion.last for portion in rest] == [False] * (len(rest) - 1) + [True] * bool(rest)
    assert [round(p.ended) for p in [*done, *rest] if p.ends_epoch] == list(range(1, epochs + 1))
    assert {p.examples[0].where for p in rest} <= seen.keys()


@settings(deadline=None, max_examples=100, derandomize=True)
@given(**COUNTS)
def test_the_schedule_keeps_its_fraction_of_the_samples(rows, epochs, before, after, cut):
    """The rate of a step is that of the step before it in the old batch, whichever batch it is taken in."""
    dataset = rows_in_memory(rows)
    recipes = [recipe_of(b, num_train_epochs=epochs, lr_scheduler_type="linear") for b in (before, after)]
    first, second = feeds = [feed_of(recipe, dataset) for recipe in recipes]
    done, rest = cut_and_go_on(feeds, cut)
    pace, rates = resume_pace(recipes[1], dataset, second.begin, rest=0.0)
    places = [pace.place(portion.step, portion.samples) for portion in rest]
    if places:
        assert places[0] == len(done)  # nothing jumps
        assert max(places) < first.total
        assert places == sorted(set(places))
    if rates is None:
        assert places == [portion.step for portion in rest]
        return
    for place in places:  # a line, between its steps too
        assert rates.between(place) == pytest.approx(rates.peak * (1 - place / first.total), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(**{**COUNTS, "epochs": st.sampled_from([0.3, 0.5, 1.5, 2.25])})
def test_a_part_of_an_epoch_ends_within_its_schedule(rows, epochs, before, after, cut):
    dataset = rows_in_memory(rows)
    recipes = [recipe_of(batch, num_train_epochs=epochs, lr_scheduler_type="linear") for batch in (before, after)]
    first, second = (feed_of(recipe, dataset) for recipe in recipes)
    _, rest = cut_and_go_on((first, second), cut)
    pace, rates = resume_pace(recipes[1], dataset, second.begin, rest=0.0)
    places = [pace.place(portion.step, portion.samples) for portion in rest]
    assert rates is None or all(0.0 <= rates.between(place) <= rates.peak for place in places)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(**COUNTS, supervised=st.integers(1, 3), limit=st.integers(1, 200))
def test_steps_and_tokens_end_a_run_where_they_say(rows, epochs, before, after, cut, supervised, limit):
    dataset = rows_in_memory(rows, supervised)
    by_steps = [feed_of(recipe_of(batch, max_steps=limit), dataset) for batch in (before, after)]
    done, rest = cut_and_go_on(by_steps, cut)
    assert len(done) + len(rest) == limit
    done, rest = cut_and_go_on([feed_of(recipe_of(b, max_tokens=limit), dataset) for b in (before, after)], cut)
    tokens = np.cumsum([p.num_supervised for p in [*done, *rest]])
    assert tokens[-1] >= limit
    assert len(tokens) == 1 or tokens[-2] < limit


@settings(deadline=None, max_examples=15, derandomize=True)
@given(**{**COUNTS, "rows": st.integers(2, 20), "epochs": st.integers(1, 2)}, buffer=st.integers(1, 12))
def test_every_row_of_a_stream_comes_exactly_as_often_as_there_are_epochs(rows, epochs, before, after, cut, buffer):
    given_rows = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(rows)]
    data = Data(train=[Source(path="rows")], streaming=True)

    def feed(batch):
        stream = prepare_data(data, tiny_tokenizer(), seed=0, given=given_rows).train
        return StreamFeed(stream=stream, batch=batch, seed=1, buffer=buffer, epochs=epochs)

    feeds = feed(before), feed(after)
    done, rest = cut_and_go_on(feeds, cut)
    seen = Counter(example.where for portion in [*done, *rest] for example in portion.examples)
    assert list(seen.values()) == [epochs] * rows
    parts = [portion.ended % 1.0 for portion in [*done, *rest][-1:]]
    assert parts == [0.0]


def test_the_epoch_of_an_older_streams_checkpoint_goes_on_where_it_was(tmp_path):
    stream = prepare_data(Data(train=[Source(path="rows")], streaming=True), tiny_tokenizer(), seed=0,
                          given=[{"prompt": f"{i}?", "completion": f"{i}"} for i in range(20)]).train  # fmt: skip
    feed = StreamFeed(stream=stream, batch=4, seed=0, buffer=5, epochs=3)
    *_, portion = itertools.islice(feed.portions(0), 7)
    state = feed.state(portion)
    older = {**state, "taken": 2, "per_epoch": 5}
    del older["samples"], older["epoch_samples"]
    again = StreamFeed(stream=stream, batch=8, seed=0, buffer=5, epochs=3)
    again.load_state(older, Reached(step=7, samples=28, batch=4))
    assert (again.begin.samples, again.begin.epoch_samples) == (state["samples"], state["epoch_samples"]) == (8, 20)
    assert again.begin.passes == portion.ended == 1.4


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}"}) + "\n" for i in range(20)))
    return path


def stops_after(count):
    return luthier.on(step_ended=lambda run: run.step == count and signal_self())


def signal_self():
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


def numbers(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def older_checkpoint(folder, form):
    """Make a checkpoint what an earlier luthier wrote: its tally knows neither batch nor held steps."""
    (path,) = checkpoint.list_checkpoints(folder)
    tree = json.loads((path / "state.json").read_text())
    manifest = checkpoint.read_manifest(path)
    removed = [tree["tally"].pop(name) for name in ("batch", "held")]
    (path / "state.json").write_text(json.dumps(tree))
    manifest = {**manifest, "format": form, "files": {**manifest["files"]}}
    from luthier.disk import digest_file

    manifest["files"]["state.json"] = digest_file(path / "state.json")
    manifest["digest"] = checkpoint._own_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return removed


@pytest.mark.parametrize("older", [False, True])
def test_a_run_that_goes_on_with_twice_the_batch_trains_on_every_row_of_its_epochs(train, tmp_path, data, older):
    shared = {
        "data": data,
        "num_train_epochs": 4,
        "lr_scheduler_type": "linear",
        "model": "demo",
        "learning_rate": 1e-3,
    }
    with pytest.raises(Interrupted):
        train(**shared, global_batch_size=4, exact_callbacks=["jsonl", stops_after(7)])
    if older:
        assert older_checkpoint(tmp_path / "run", 3) == [4, 0.0]
    run = train(**shared, global_batch_size=8, allow_changed="settings")
    assert (run.samples_seen, run.steps) == (80, 15)
    lines = numbers(tmp_path / "run")
    taken = [0, *(line["samples"] for line in lines)][:-1]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (1 - n / 80) for n in taken])
    assert [line["epoch"] for line in lines] == [line["samples"] / 20 for line in lines]
    assert read_record(tmp_path / "run")["total_steps"] == 15


@pytest.mark.slow
def test_by_steps_the_steps_count_and_so_does_the_schedule(train, tmp_path, data):
    shared = {"data": data, "max_steps": 10, "lr_scheduler_type": "linear"}
    with pytest.raises(Interrupted):
        train(**shared, global_batch_size=4, exact_callbacks=["jsonl", stops_after(5)])
    run = train(**shared, global_batch_size=8, allow_changed="settings")
    assert (run.samples_seen, run.steps) == (20 + 8 + 8 + 4 + 8 + 8, 10)
    rates = [line["learning_rate"] for line in numbers(tmp_path / "run")]
    assert rates == pytest.approx([1e-2 * (1 - step / 10) for step in range(10)])


@pytest.mark.slow
def test_the_batch_may_change_twice_and_back(train, tmp_path, data):
    shared = {"data": data, "num_train_epochs": 4, "lr_scheduler_type": "linear", "allow_changed": "settings"}
    for batch, cut in ((4, 3), (7, 5)):
        with pytest.raises(Interrupted):
            train(**shared, global_batch_size=batch, exact_callbacks=["jsonl", stops_after(cut)])
    run = train(**shared, global_batch_size=4)
    assert run.samples_seen == 80
    lines = numbers(tmp_path / "run")
    taken = [0, *(line["samples"] for line in lines)][:-1]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2 * (1 - n / 80) for n in taken])


@pytest.mark.slow
@pytest.mark.parametrize("cut", [4, 7])
def test_a_task_of_a_continual_run_goes_on_with_another_batch(task_files, tmp_path, cut):
    """Nine rows of each task train, three times each: five steps of two make an epoch."""
    recipe = {"model": "demo", "data": {"validation": 0.25, "max_length": 64}, "num_train_epochs": 3,
              "memory_check": False, "tasks": [{"name": n, "data": str(p)} for n, p in task_files.items()]}  # fmt: skip
    folders = [tmp_path / "out" / name for name in ("task-00-first", "task-01-second")]
    with pytest.raises(Interrupted):
        stops = luthier.on(step_ended=lambda run: run.step == cut and run.folder == folders[cut % 2] and signal_self())
        luthier.continual(recipe, global_batch_size=2, exact_callbacks=["jsonl", stops], output_dir=tmp_path / "out")
    luthier.continual(recipe, global_batch_size=4, exact_callbacks=["jsonl"], output_dir=tmp_path / "out",
                      allow_changed="settings")  # fmt: skip
    assert [read_record(folder)["result"]["samples_seen"] for folder in folders] == [27, 27]


def test_fewer_rows_than_were_taken_are_refused_and_not_passed_over(train, tmp_path, data):
    shared = {"model": "demo", "num_train_epochs": 4, "global_batch_size": 4}
    with pytest.raises(Interrupted):
        train(**shared, data=data, exact_callbacks=["jsonl", stops_after(7)])
    few = tmp_path / "few.jsonl"
    few.write_text("".join(f"{line}\n" for line in data.read_text().splitlines()[:5]))
    with pytest.raises(LuthierError) as caught:
        train(**shared, data=few, allow_changed=("data", "settings"))
    assert (caught.value.code, caught.value.where) == ("recipe-out-of-range", "data")


def test_half_an_epoch_goes_on_with_another_batch_to_its_end(train, tmp_path, data):
    shared = {"model": "demo", "data": data, "num_train_epochs": 0.5}
    with pytest.raises(Interrupted):
        train(**shared, global_batch_size=1, exact_callbacks=["jsonl", stops_after(4)])
    assert train(**shared, global_batch_size=7, allow_changed="settings").samples_seen >= 10
