"""The callback `tensorboard`, by what TensorBoard reads back from its event files."""

import json
import shutil
import threading

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.runs.writing.active_run import ActiveRun
from luthier.testing import captured_logs

NAMES = [
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "peak_memory",
    "epoch",
]
METRICS = st.dictionaries(st.sampled_from(NAMES), st.floats(-1e30, 1e30), min_size=1)


@settings(max_examples=15, deadline=None)
@given(st.lists(METRICS, min_size=1, max_size=5))
def test_every_number_is_drawn_under_its_own_name_at_its_own_step(tmp_path_factory, start, read, lines):
    folder = tmp_path_factory.mktemp("run")
    run = ActiveRun(run_id="r", folder=folder, name="n", settings={}, total_steps=len(lines))
    hooks = start()
    hooks.run_started(run=run)
    for step, metrics in enumerate(lines, 1):
        hooks.logged(run=run, step=step, metrics=metrics)
    hooks.completed(run=run, result=None)
    shown = read(folder / "tensorboard")
    found = {(tag, p.step): p.value for tag in shown.Tags()["scalars"] for p in shown.Scalars(tag)}
    assert found == {(name, i): np.float32(v) for i, line in enumerate(lines, 1) for name, v in line.items()}


def test_evaluations_are_drawn_beside_the_training_steps(start, run, curve):
    hooks = start()
    hooks.run_started(run=run)
    hooks.evaluated(run=run, step=0, metrics={"eval_loss": 4.0})
    hooks.logged(run=run, step=1, metrics={"loss": 3.0})
    hooks.evaluated(run=run, step=1, metrics={"eval_loss": 3.5})
    hooks.completed(run=run, result=None)
    assert curve(run.folder / "tensorboard", "eval_loss") == {0: 4.0, 1: 3.5}
    assert curve(run.folder / "tensorboard", "loss") == {1: 3.0}


def test_values_that_are_not_finite_are_kept(start, run, curve):
    hooks = start()
    hooks.run_started(run=run)
    hooks.logged(run=run, step=1, metrics={"loss": float("nan"), "grad_norm": float("inf")})
    hooks.failed(run=run, error=ValueError())
    assert np.isnan(curve(run.folder / "tensorboard", "loss")[1])
    assert curve(run.folder / "tensorboard", "grad_norm") == {1: float("inf")}


def test_the_recipe_is_a_text(start, run, read):
    hooks = start()
    hooks.run_started(run=run)
    hooks.completed(run=run, result=None)
    (shown,) = read(run.folder / "tensorboard").Tensors("recipe")
    text = shown.tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == run.settings


def test_log_dir_takes_the_place_of_the_run_folder(start, run, curve, tmp_path):
    hooks = start(log_dir=str(tmp_path / "elsewhere"))
    hooks.run_started(run=run)
    hooks.logged(run=run, step=1, metrics={"loss": 3.0})
    hooks.completed(run=run, result=None)
    assert curve(tmp_path / "elsewhere", "loss") == {1: 3.0}
    assert not (run.folder / "tensorboard").exists()


def test_what_a_checkpoint_holds_is_on_the_disk_while_the_run_goes_on(start, run, curve, tmp_path):
    hooks = start()
    hooks.run_started(run=run)
    for step in range(1, 51):
        hooks.logged(run=run, step=step, metrics={"loss": 1.0})
    hooks.saved(run=run, step=50, path=tmp_path)
    assert list(curve(run.folder / "tensorboard", "loss")) == list(range(1, 51))
    hooks.completed(run=run, result=None)


def test_a_resumed_run_forgets_what_was_written_beyond_its_checkpoint(start, run, curve, tmp_path):
    killed = start()
    killed.run_started(run=run)
    for step in range(1, 8):
        killed.logged(run=run, step=step, metrics={"loss": 1.0})
    killed.saved(run=run, step=7, path=tmp_path)
    hooks = start()
    hooks.resumed(run=run, step=5)
    for step in range(6, 10):
        hooks.logged(run=run, step=step, metrics={"loss": 2.0})
    hooks.completed(run=run, result=None)
    expected = {s: 1.0 if s <= 5 else 2.0 for s in range(1, 10)}
    assert curve(run.folder / "tensorboard", "loss") == expected


def test_a_run_killed_before_its_first_checkpoint_starts_a_clean_curve(start, run, curve):
    for value, steps in ((1.0, 4), (2.0, 2)):
        hooks = start()
        hooks.run_started(run=run)
        for step in range(1, steps + 1):
            hooks.logged(run=run, step=step, metrics={"loss": value})
        hooks.stopped(run=run, step=steps, reason="signal 15")
    assert curve(run.folder / "tensorboard", "loss") == {1: 2.0, 2: 2.0}


def test_only_the_first_rank_writes(start, run):
    hooks = start()
    other = attrs.evolve(run, is_main=False)
    hooks.run_started(run=other)
    hooks.logged(run=other, step=1, metrics={"loss": 3.0})
    hooks.evaluated(run=other, step=1, metrics={"eval_loss": 3.0})
    hooks.saved(run=other, step=1, path=run.folder)
    hooks.completed(run=other, result=None)
    assert not run.folder.exists()


@pytest.mark.parametrize("end", ["stopped", "completed", "failed"])
def test_every_end_of_a_run_closes_the_file(start, run, curve, end):
    hooks = start()
    hooks.run_started(run=run)
    hooks.logged(run=run, step=1, metrics={"loss": 3.0})
    arguments = {
        "stopped": {"step": 1, "reason": "signal 2"},
        "completed": {"result": None},
        "failed": {"error": OSError()},
    }
    getattr(hooks, end)(run=run, **arguments[end])
    assert curve(run.folder / "tensorboard", "loss") == {1: 3.0}


def test_completed_after_stopped_does_nothing(start, run, curve):
    hooks = start()
    hooks.run_started(run=run)
    hooks.stopped(run=run, step=1, reason="early")
    with captured_logs() as lines:
        hooks.completed(run=run, result=None)
    assert lines == []


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(start, run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LuthierError, match="log_dir") as caught:
        start(log_dir=str(tmp_path / "file" / "logs")).run_started(run=run)
    assert caught.value.code == "part-unsupported"
    assert caught.value.where == "callback 'tensorboard'"


def test_a_lost_folder_is_logged_once_and_training_goes_on(start, run, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda met: None)  # the writing thread would print its traceback
    hooks = start()
    hooks.run_started(run=run)
    hooks.saved(run=run, step=0, path=run.folder)  # waits until the writing thread has made its file
    shutil.rmtree(run.folder)
    run.folder.write_text("in the way")
    with captured_logs() as lines:
        for step in range(1, 100):
            hooks.logged(run=run, step=step, metrics={"loss": 3.0})
        hooks.saved(run=run, step=100, path=run.folder)
        hooks.completed(run=run, result=None)
    (line,) = lines
    assert line["event"] == "tracker_failed"
    assert line["level"] == "error"
    assert line["tracker"] == "tensorboard"
    assert line["error"].startswith(("NotADirectoryError", "FileNotFoundError"))


def test_a_value_that_is_no_number_ends_the_tracker_and_not_the_training(start, run):
    hooks = start()
    hooks.run_started(run=run)
    with captured_logs() as lines:
        hooks.logged(run=run, step=1, metrics={"loss": None, "name": "text"})
        hooks.completed(run=run, result=None)
    assert [(line["event"], line["during"]) for line in lines] == [("tracker_failed", "logged")]


def test_numbers_lost_at_the_very_end_are_said_too(start, run, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda met: None)
    hooks = start()
    hooks.run_started(run=run)
    hooks.saved(run=run, step=0, path=run.folder)
    shutil.rmtree(run.folder)
    with captured_logs() as lines:
        hooks.logged(run=run, step=1, metrics={"loss": 3.0})
        hooks.completed(run=run, result=None)
    assert [line["event"] for line in lines] == ["tracker_failed"]
