"""Faults: signals, kills and clocks that jump; on real processes and files."""

import itertools
import json
import os
import signal
import time
from datetime import datetime

import luthier
import pytest
import torch
from child_process import in_child
from luthier import disk
from luthier.builtin import Sft
from luthier.builtin.sft import SupervisedLoss
from luthier.checkpoint import folder as checkpoint
from luthier.runs.metrics_file import read_metrics as metrics
from luthier.runs.run_folder import read_folder
from luthier.runs.writing import save_requests as requests
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.record import read_record
from luthier.training.signals import handle_signals


def signalled(number, step):
    last = step
    return luthier.on(step_ended=lambda step: os.kill(os.getpid(), number) if step == last else None)


# signals


@pytest.fixture
def heard():
    """SIGHUP as a terminal sends it, although the tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_of_a_step_ends_it_saves_and_says_which_it_was(train, tmp_path, number, heard):
    middle = luthier.on(step_started=lambda step: os.kill(os.getpid(), number) if step == 2 else None)
    with pytest.raises(Interrupted) as caught:
        train(exact_callbacks=[middle])
    assert (caught.value.exit_status, caught.value.step) == (128 + number, 2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert read_record(tmp_path / "run")["state"] == "stopped"


def test_sigusr1_saves_and_the_run_goes_on(train, tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    run = train(exact_callbacks=[signalled(signal.SIGUSR1, 2)])
    assert run.steps == 3
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path / "run")] == [2, 3]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_signal_after_the_last_step_leaves_a_finished_run(train):
    assert train(exact_callbacks=[signalled(signal.SIGTERM, 3)]).steps == 3


class CutEvaluation(SupervisedLoss):
    """The usual loss; a signal comes while it scores micro-batch `at` of the run's evaluations."""

    def __init__(self, at):
        super().__init__(Sft())
        self.left = at

    def __call__(self, policy, batch):
        self.left -= not torch.is_grad_enabled()
        if self.left == 0:
            self.left = -1
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(policy, batch)


def told(folder):
    return [
        (line["step"], line.get("loss"), line.get("epoch"), line.get("eval_loss"))
        for line in metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize(("at", "step", "patience"), [(2, 0, 2), (5, 2, 2), (8, 4, 2), (11, 6, 9)])
def test_a_signal_leaves_an_evaluation_and_the_run_goes_on_with_it(train, rows, tmp_path, at, step, patience):
    """Three micro-batches an evaluation: at the beginning and after every other of six steps, or four where it stops."""
    settings = {"eval_data": rows[:3], "packing": False, "eval_steps": 2, "eval_on_start": True, "num_train_epochs": 2}
    stopper = {"name": "early_stopping", "patience": patience, "min_delta": 100.0}
    settings |= {"exact_callbacks": ["jsonl", stopper], "logging_steps": 5, "load_best_model_at_end": True}
    straight = train(**settings, loss=CutEvaluation(0), output_dir=tmp_path / "straight")
    cut = CutEvaluation(at)
    with pytest.raises(Interrupted) as caught:
        train(**settings, loss=cut)
    assert (caught.value.exit_status, caught.value.step) == (143, step)
    assert cut.left == -1  # the rest of the evaluation was left
    run = train(**settings, loss=CutEvaluation(0))
    assert (run.steps, run.stop_reason, run.eval_metrics) == (
        straight.steps,
        straight.stop_reason,
        straight.eval_metrics,
    )
    assert told(tmp_path / "run") == told(tmp_path / "straight")
    assert not any(
        checkpoint.load_checkpoint(p)["tally"]["owes_evaluation"] for p in checkpoint.list_checkpoints(tmp_path / "run")
    )
    weights = straight.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())


def test_an_evaluation_is_owed_no_longer_where_its_rows_are_given_up(train, rows):
    with pytest.raises(Interrupted):
        train(loss=CutEvaluation(1), eval_data=rows[:3], eval_steps=2)
    assert train(loss=CutEvaluation(0), allow_changed="settings,data").steps == 3


def test_a_run_under_nohup_does_not_hear_that_its_terminal_is_gone(train):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(exact_callbacks=[signalled(signal.SIGHUP, 2)]).steps == 3
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_at_once(train, tmp_path):
    def press():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(exact_callbacks=[luthier.on(step_ended=press)])
    assert read_record(tmp_path / "run")["state"] == "stopped"


def test_outside_the_main_thread_signals_are_left_alone():
    import threading

    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with handle_signals(None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# on request


def test_a_file_by_hand_asks_for_a_checkpoint_and_is_gone_when_it_is_whole(train, tmp_path):
    folder = tmp_path / "run"

    def ask(step):
        if step == 1:
            (folder / "save-now").touch()

    saved = luthier.on(saved=lambda step: seen.append((step, requests.save_pending(folder))))
    seen = []
    train(exact_callbacks=[luthier.on(step_ended=ask), saved])
    assert seen == [(1, False), (3, False)]
    assert not list(folder.glob("*save-now*"))


def test_a_request_that_comes_while_one_is_answered_is_answered_too(tmp_path):
    requests.ask_save(tmp_path)
    assert requests.take_request(tmp_path)
    requests.ask_save(tmp_path)
    requests.answer_request(tmp_path)
    assert requests.save_pending(tmp_path)
    assert requests.take_request(tmp_path) and not requests.take_request(tmp_path)
    requests.answer_request(tmp_path)
    assert not requests.save_pending(tmp_path)


def test_a_request_that_a_dead_process_has_seen_is_forgotten(tmp_path):
    requests.ask_save(tmp_path)
    requests.take_request(tmp_path)
    checkpoint.tidy_checkpoints(tmp_path)
    assert not requests.save_pending(tmp_path)


# kills


def test_a_kill_at_each_step_of_the_way_to_a_whole_checkpoint_leaves_whole_ones(tmp_path):
    """The process dies at its first, second, third... call of the operating system that changes the folder."""
    calls = ("mkdir", "replace", "fsync", "unlink", "rmdir")

    def dying(at):
        count = itertools.count(1)

        def deadly(real):
            def call(*arguments, **named):
                if next(count) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            return call

        def act():
            for name in calls:
                setattr(os, name, deadly(getattr(os, name)))
            checkpoint.save(folder, 2, {"step": 2, "w": torch.full((9,), 2.0)})
            checkpoint.prune_checkpoints(folder, 1, None)

        return in_child(act)

    for at in itertools.count(1):
        folder = tmp_path / str(at)
        for step in (1, 2):
            checkpoint.save(folder, step, {"step": step, "w": torch.full((9,), float(step))})
        status = dying(at)
        checkpoint.tidy_checkpoints(folder)
        path, tree, damaged = checkpoint.newest_checkpoint(folder)
        assert (path.name, float(tree["w"].sum()), damaged) == ("step-00000002", 18.0, [])
        assert all(p.name.startswith("step-") for p in path.parent.iterdir())
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert at > 10


def test_a_killed_run_is_shown_as_such_and_goes_on(train, data, tmp_path):
    def act():
        train(data=data, save_steps=1, exact_callbacks=[signalled(signal.SIGKILL, 3)])

    assert in_child(act) == -signal.SIGKILL
    assert read_folder(tmp_path / "run").state == "killed"
    run = train(data=data, save_steps=1)
    assert run.steps == 3
    assert read_folder(tmp_path / "run").state == "completed"


# clocks


def test_a_clock_that_jumps_changes_nothing(train, data, tmp_path, monkeypatch):
    """Back by years and forth again at every look; files get times of any order."""
    straight = train(data=data, output_dir=tmp_path / "straight", save_steps=1)
    jumps, real = itertools.cycle([-3e8, 3e8, -1e9, 5e8]), time.time

    def stop(step):
        os.utime(tmp_path / "run", (0, 0))
        for path in (tmp_path / "run").rglob("*"):
            os.utime(path, (0, 10**9 - step))
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    with pytest.raises(Interrupted):
        train(data=data, save_steps=1, exact_callbacks=["jsonl", luthier.on(step_ended=stop)])
    run = train(data=data, save_steps=1)
    assert run.loss_history == straight.loss_history
    assert 0 < run.duration_seconds < 60
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert datetime.fromisoformat(read_record(tmp_path / "run")["updated"])


def test_the_engine_looks_at_no_wall_clock():
    """Names and records carry a time of day; nothing is decided by one, nor by the times of files."""
    import ast
    from pathlib import Path

    used, core = [], Path(disk.__file__).parent
    rooms = ("training", "step", "checkpoint", "memory", "health", "distributed", "model", "precision", "hardware")
    folders = [core / room for room in (*rooms, "data/batches", "runs/writing")]
    assert all(folder.is_dir() for folder in folders)
    for path in (core / "disk.py", core / "state_tree.py", *(p for folder in folders for p in folder.rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("st_mtime", "st_mtime_ns", "st_ctime", "getmtime"):
                used.append(f"{path.name}: {node.attr}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.time":
                used.append(f"{path.name}: time.time")
    assert used == []
