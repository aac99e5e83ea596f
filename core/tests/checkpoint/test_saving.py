"""Saving: when a checkpoint is due, and that writing it in the background changes nothing but the time it takes."""

import errno
import os
import shutil
import signal
import threading

import hypothesis.strategies as st
import luthier
import pytest
import torch
from hypothesis import given, settings
from luthier import logs
from luthier.checkpoint import folder as checkpoint
from luthier.checkpoint import run_state as contents
from luthier.checkpoint import saver as saving
from luthier.checkpoint.saver import Cadence, Saver
from luthier.errors import LuthierError
from luthier.recipe import Recipe
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record


def kept(folder):
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder)]


STRATEGIES = [  # 24 rows in steps of 8, two epochs: 6 steps
    ({}, [6]),
    ({"save_steps": 4}, [4, 6]),
    ({"save_strategy": "steps", "save_steps": 3}, [3, 6]),
    ({"save_strategy": "epoch"}, [3, 6]),
    ({"save_strategy": "epoch", "save_final": False, "num_train_epochs": 1.5}, [3]),
    ({"save_strategy": "samples", "save_samples": 20}, [3, 5, 6]),
    ({"save_samples": 8, "save_steps": 5, "save_final": False, "max_steps": 2}, [1, 2]),
    ({"save_samples": 30, "save_steps": 5, "save_final": False}, [4, 5]),
    ({"save_strategy": "no"}, [6]),
    ({"save_strategy": "no", "save_final": False}, []),
]


@pytest.mark.parametrize(("changes", "steps"), STRATEGIES, ids=lambda v: " ".join(map(str, v)) if v else "none")
def test_each_strategy_writes_its_checkpoints_and_none_twice(train, tmp_path, changes, steps):
    told = []
    watch = luthier.on(saved=lambda step: told.append(step))  # noqa: PLW0108
    run = train(**{"num_train_epochs": 2, **changes}, exact_callbacks=[watch])
    assert kept(tmp_path / "run") == told == steps
    assert (run.artifact / "config.json").is_file()
    said = "writes no checkpoint by itself" in (tmp_path / "run/log.jsonl").read_text()
    assert said == (not steps)


def test_a_run_that_keeps_no_checkpoint_still_saves_when_it_is_asked_to(train, tmp_path):
    ask = luthier.on(step_ended=lambda run, step: run.request_save() if step == 2 else None)
    train(save_strategy="no", save_final=False, exact_callbacks=[ask])
    assert kept(tmp_path / "run") == [2]


def test_a_run_that_is_stopped_early_ends_as_a_run_does(train, tmp_path):
    stop = luthier.on(step_ended=lambda run, step: run.request_stop("enough") if step == 2 else None)
    train(exact_callbacks=[stop], save_final=False)
    assert kept(tmp_path / "run") == []
    train(exact_callbacks=[stop], output_dir=tmp_path / "other")
    assert kept(tmp_path / "other") == [2]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(every=st.integers(1, 50), batches=st.lists(st.integers(0, 60), min_size=1, max_size=30))
def test_a_checkpoint_is_due_after_each_step_that_reaches_another_so_many_examples(every, batches):
    cadence, total = Cadence(samples=every, final=False), 0
    for step, seen in enumerate(batches, 1):
        before, total = total, total + seen
        reached = any(n % every == 0 for n in range(before + 1, total + 1))
        assert cadence.due(step=step, samples=total, seen=seen, epoch_ended=False, last=False) == reached


CONTRADICTIONS = [
    ({"save_strategy": "steps"}, "recipe-missing", "save_steps"),
    ({"save_strategy": "samples"}, "recipe-missing", "save_samples"),
    ({"save_strategy": "epoch", "save_steps": 3}, "recipe-conflict", "save_steps"),
    ({"save_strategy": "steps", "save_steps": 3, "save_samples": 4}, "recipe-conflict", "save_samples"),
    ({"save_strategy": "no", "save_samples": 4}, "recipe-conflict", "save_samples"),
    (
        {"save_strategy": "no", "load_best_model_at_end": True, "data": {"train": "d", "validation": 0.1}},
        "recipe-conflict",
        "load_best_model_at_end",
    ),
    ({"max_shard_size": "5 gigs"}, "recipe-out-of-range", "max_shard_size"),
    ({"max_shard_size": "0GB"}, "recipe-out-of-range", "max_shard_size"),
]


@pytest.mark.parametrize(("changes", "code", "where"), CONTRADICTIONS, ids=lambda v: str(v)[:40])
def test_what_would_have_no_effect_is_refused_where_it_stands(changes, code, where):
    with pytest.raises(LuthierError) as caught:
        Recipe.from_dict({"model": "demo", "data": "rows.jsonl", **changes})
    assert (caught.value.code, caught.value.where) == (code, where)


# in the background


def test_checkpoints_in_the_background_are_the_same_to_the_byte(train, tmp_path, rows):
    """The state goes on while it is written, into memory that the next one uses again."""
    shared = {"num_train_epochs": 2, "save_steps": 1, "eval_data": rows[:4], "eval_steps": 2}
    for background in (True, False):
        train(**shared, async_save=background, output_dir=tmp_path / str(background))
    for step in range(1, 7):
        one, other = (checkpoint.folder_of(tmp_path / str(b), step) / "state.safetensors" for b in (True, False))
        assert one.read_bytes() == other.read_bytes(), step


class SlowDisk:
    """`os.fsync` of the background's thread, held back until it is let go."""

    def __init__(self, monkeypatch, fail=None):
        self.entered, self.go, self.fail, self.real = threading.Event(), threading.Event(), fail, os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor):
        if threading.current_thread().name == "luthier-checkpoint":
            self.entered.set()
            assert self.go.wait(60)
            if self.fail is not None:
                raise self.fail
        return self.real(descriptor)


def test_training_goes_on_while_a_checkpoint_is_written_and_saved_is_told_once_it_is_whole(
    train, tmp_path, monkeypatch
):
    disk, seen = SlowDisk(monkeypatch), []

    def ended(step):
        seen.append((step, kept(tmp_path / "run")))
        if step == 4:
            disk.go.set()

    watch = luthier.on(step_ended=ended, saved=lambda step, path: seen.append(("saved", step, path.is_dir())))
    train(num_train_epochs=2, save_strategy="no", exact_callbacks=[watch, asking(1)])
    before = seen.index(("saved", 1, True))
    assert [step for step, held in seen[: seen.index((4, []))] if held] == []  # nothing to be seen of it
    assert before > seen.index((4, []))
    assert kept(tmp_path / "run") == [1, 6]


def asking(step):
    last = step
    return luthier.on(step_ended=lambda run, step: run.request_save() if step == last else None)


def test_the_next_checkpoint_waits_for_the_one_before_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "LONG", 0.0)
    disk, told = SlowDisk(monkeypatch), []
    saver = Saver(tmp_path, {}, background=True, limit=None)
    with saver:
        saver.save(1, {"w": torch.ones(3)}, None, told.append)
        assert disk.entered.wait(60)
        saver.collect()
        assert told == []
        threading.Timer(0.01, disk.go.set).start()
        saver.save(2, {"w": torch.ones(3)}, None, told.append)
        assert [path.name for path in told] == ["step-00000001"]
    assert kept(tmp_path) == [1, 2] == [checkpoint.step_of(path) for path in told]
    assert "waited for the checkpoint before" in capsys.readouterr().err


def test_what_the_background_meets_ends_the_run_after_a_later_step(train, tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch, fail=OSError(errno.ENOSPC, "No space left on device"))
    disk.go.set()
    entered = luthier.on(step_ended=lambda step: step == 1 or disk.entered.wait(60))
    with pytest.raises(LuthierError) as caught:
        train(num_train_epochs=2, exact_callbacks=[asking(1), entered])
    assert (caught.value.code, caught.value.where[-13:]) == ("disk-full", "step-00000001")
    assert read_record(tmp_path / "run")["state"] == "failed"
    assert read_record(tmp_path / "run")["step"] >= 2
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_what_the_last_checkpoint_meets_ends_the_run_before_its_artifact(train, tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch, fail=OSError(errno.EIO, "Input/output error"))
    disk.go.set()
    with pytest.raises(OSError, match="Input/output error"):
        train()
    assert not (tmp_path / "run/model").exists()


def test_an_error_of_the_training_waits_for_the_checkpoint_on_its_way(train, tmp_path, monkeypatch):
    disk, told = SlowDisk(monkeypatch), []

    def explode(step):
        if step == 2:
            threading.Timer(0.01, disk.go.set).start()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        train(exact_callbacks=[asking(1), luthier.on(step_ended=explode, saved=lambda step: told.append(step))])  # noqa: PLW0108
    assert kept(tmp_path / "run") == told == [1]


def test_a_lost_checkpoint_does_not_hide_the_error_of_the_training(train, monkeypatch, capsys):
    disk = SlowDisk(monkeypatch, fail=OSError(errno.EIO, "Input/output error"))

    def explode(step):
        if step == 2:
            disk.go.set()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        train(exact_callbacks=[asking(1), luthier.on(step_ended=explode)])
    assert "being written is lost" in capsys.readouterr().err


def test_a_signal_waits_until_its_checkpoint_is_whole(train, tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)

    def end(step):
        if step == 2:
            threading.Timer(0.01, disk.go.set).start()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        train(exact_callbacks=[luthier.on(step_ended=end)])
    assert (caught.value.exit_status, kept(tmp_path / "run")) == (143, [2])


def test_old_checkpoints_go_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(3)})
    disk = SlowDisk(monkeypatch)
    with Saver(tmp_path, {}, background=True, limit=1) as saver:
        saver.save(2, {"w": torch.ones(3)}, None, lambda path: None)
        assert disk.entered.wait(60)
        assert kept(tmp_path) == [1]
        disk.go.set()
    assert kept(tmp_path) == [2]


def test_the_best_checkpoint_is_kept_although_it_is_on_its_way_when_the_next_is_due(train, tmp_path, monkeypatch, rows):
    disk = SlowDisk(monkeypatch)
    release = luthier.on(step_ended=lambda step: threading.Timer(0.01, disk.go.set).start() if step == 2 else None)
    first = {"metric_for_best_model": "eval_perplexity", "greater_is_better": True}  # it falls from the first step on
    run = train(**first, eval_data=rows[:6], eval_steps=1, save_steps=1, save_total_limit=1, exact_callbacks=[release])
    assert kept(tmp_path / "run") == [1, 3]
    assert run.best_checkpoint.name == "step-00000001"


def test_a_run_whose_best_checkpoint_is_gone_says_that_it_ends_with_the_last(train, tmp_path, rows, capsys):
    def lose(step):
        if step == 3:
            shutil.rmtree(tmp_path / "run/checkpoints/step-00000001")

    first = {"metric_for_best_model": "eval_perplexity", "greater_is_better": True, "load_best_model_at_end": True}
    shared = {"eval_data": rows[:6], "eval_steps": 1, "async_save": False}
    run = train(**first, **shared, exact_callbacks=[luthier.on(saved=lose)])
    assert run.best_checkpoint is None
    assert "no best checkpoint to end with" in capsys.readouterr().err


def test_the_best_checkpoint_is_found_in_the_background_too(train, tmp_path, rows):
    worst = {"metric_for_best_model": "eval_perplexity", "greater_is_better": True, "load_best_model_at_end": True}
    shared = {"eval_data": rows[:6], "eval_steps": 1, "save_total_limit": 1, **worst}
    one = train(**shared, output_dir=tmp_path / "a")
    other = train(**shared, output_dir=tmp_path / "b", async_save=False)
    assert one.best_checkpoint.name == other.best_checkpoint.name != f"step-{one.steps:08d}"
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert kept(tmp_path / "a") == kept(tmp_path / "b")


def test_a_metric_that_no_evaluation_gives_is_found_before_the_run_begins(train, tmp_path, rows):
    with pytest.raises(LuthierError, match="eval_accuracy") as caught:
        train(eval_data=rows[:2], metric_for_best_model="eval_acuracy", load_best_model_at_end=True)
    assert caught.value.where == "metric_for_best_model"
    assert not (tmp_path / "run").exists()
    run = train(eval_data=rows[:2], metric_for_best_model="eval_accuracy", load_best_model_at_end=True)
    assert "eval_accuracy" in run.eval_metrics


# what it holds


class Counting:
    """Anything of a run with a state of its own."""

    def __init__(self):
        self.count = torch.zeros(())

    def state(self):
        return {"count": self.count}

    def load_state(self, state):
        self.count = state["count"]


@pytest.fixture
def held(train):
    """The `Setup` of a run of one step, with a scaler in the place of what has none."""
    setup = train(max_steps=1)._setup
    setup.context = Counting()
    return setup


def collected(setup, callbacks):
    return contents.collect_state(setup.adapter, setup.optimizer, setup.stateful_parts, callbacks)


def restore(setup, callbacks, tree, fresh=frozenset()):
    contents.restore_state(setup.adapter, setup.optimizer, setup.stateful_parts, callbacks, tree, fresh)


def test_every_object_of_the_setup_that_has_a_state_is_in_the_checkpoint_and_goes_back(held, tmp_path):
    callbacks = {"loss": Counting(), "quiet": object()}  # whatever name a callback has
    held.context.count += 3
    callbacks["loss"].count += 5
    tree = checkpoint.load_checkpoint(checkpoint.save(tmp_path, 1, collected(held, callbacks)))
    held.context, callbacks["loss"] = Counting(), Counting()
    restore(held, callbacks, tree)
    assert (float(held.context.count), float(callbacks["loss"].count)) == (3, 5)


def test_what_begins_anew_keeps_its_state_and_what_nobody_takes_is_told(held, tmp_path, capsys):
    tree = collected(held, {"gone": Counting()})
    held.context.count += 3
    logs.set_up("info")
    restore(held, {}, tree, frozenset({"context", "optimizer"}))
    logs.set_up("warning")
    assert float(held.context.count) == 3
    assert "nothing here takes" in capsys.readouterr().err
