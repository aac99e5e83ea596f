"""Faults: kills, full disks, locks of the dead, clocks that jump; on real processes and files."""

import ctypes
import errno
import fcntl
import itertools
import json
import os
import signal
import socket
import time
from datetime import datetime

import luthier
import pytest
import torch
from luthier import disk
from luthier.builtin.sft import SupervisedLoss
from luthier.checkpoint import folder as checkpoint
from luthier.disk import Reserve, is_full, write_json
from luthier.errors import LuthierError
from luthier.plugins.records import NoOptions
from luthier.runs.metrics_file import read_metrics as metrics
from luthier.runs.run_folder import is_held, read_folder
from luthier.runs.writing import save_requests as requests
from luthier.runs.writing.active_run import Interrupted
from luthier.runs.writing.lock import locked_folder
from luthier.runs.writing.record import read_record
from luthier.training.signals import handle_signals


@pytest.fixture
def data(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_child(act):
    """The exit status of `act` in a forked process; its exceptions are 99."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = act() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
        super().__init__(NoOptions())
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


# disks


def on_full_disk(tmp_path, act):
    """`act(folder)` in a child whose `folder` is a disk of 2 MB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def child():
        libc = ctypes.CDLL(None, use_errno=True)
        private = libc.unshare(0x00020000) == 0  # CLONE_NEWNS
        libc.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE: nobody else sees the disk
        if not private or libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=2m") != 0:
            return 77
        return act(folder)

    status = in_child(child)
    if status == 77:
        pytest.skip("this user may mount no disk of its own")
    return status


def fill(folder):
    """Every last byte of a disk."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (65536, 1):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break


def test_a_disk_that_is_full_to_the_last_byte_ends_the_run_and_its_record_says_so(train, data, tmp_path):
    def act(folder):
        brim = luthier.on(step_ended=lambda step: fill(folder) if step == 2 else None)
        settings = {"data": data, "output_dir": folder / "run", "save_steps": 1}
        try:
            train(**settings, exact_callbacks=[brim])
        except LuthierError as error:
            if error.code != "disk-full":
                return 1
        record = read_record(folder / "run")
        if (record["state"], [p.name for p in checkpoint.list_checkpoints(folder / "run")]) != (
            "failed",
            ["step-00000001"],
        ):
            return 2
        (folder / "ballast").unlink()
        return 0 if train(**{**settings, "save_steps": None}, save_total_limit=1).steps == 3 else 3

    assert on_full_disk(tmp_path, act) == 0


def test_a_disk_without_room_at_all_refuses_the_run_before_its_first_step(train, data, tmp_path):
    def act(folder):
        (folder / "run").mkdir()
        (folder / "run/lock").touch()
        fill(folder)
        steps = []
        try:
            train(
                data=data, output_dir=folder / "run", exact_callbacks=[luthier.on(step_started=lambda: steps.append(1))]
            )
        except LuthierError as error:
            return 0 if error.code == "disk-full" and not steps else 1
        return 2

    assert on_full_disk(tmp_path, act) == 0


def test_what_is_reserved_has_no_name_and_is_room_once_it_is_released(tmp_path):
    def act(folder):
        reserve = Reserve(folder)
        if list(folder.iterdir()):
            return 1
        fill(folder)
        try:
            write_json(folder / "run.json", {"state": "failed"})
            return 2
        except OSError as error:
            if not is_full(error):
                return 3
        reserve.release()
        write_json(folder / "run.json", {"state": "failed"})
        return 0

    assert on_full_disk(tmp_path, act) == 0


def test_the_errors_of_libraries_that_keep_only_a_text_are_known_as_a_full_disk():
    assert is_full(OSError(errno.ENOSPC, "")) and is_full(OSError(errno.EDQUOT, ""))
    assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert is_full(RuntimeError("File too large (os error 27)")) and is_full(RuntimeError("(os error 122)"))
    assert not is_full(OSError(errno.EIO, "Input/output error"))


# locks


def test_the_lock_names_its_owner_and_is_free_afterwards(tmp_path):
    with locked_folder(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"pid {os.getpid()} on {socket.gethostname()}")
        assert is_held(tmp_path)
        with pytest.raises(LuthierError, match=f"held by pid {os.getpid()}"), locked_folder(tmp_path):
            """Never here."""
    assert not is_held(tmp_path)
    assert (tmp_path / "lock").read_text() == ""


def dead_pid():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_what_a_dead_process_left_in_the_lock_hinders_nobody(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").write_text(f"pid {dead_pid()} on {socket.gethostname()} since 2026-01-01 00:00:00\n")
    assert train().steps == 3


def test_the_lock_that_only_a_child_of_a_dead_process_holds_is_taken_over_aloud(tmp_path, capsys):
    """A worker that outlives a killed trainer has its open files."""
    path = tmp_path / "lock"
    path.write_text(f"pid {dead_pid()} on {socket.gethostname()} since 2026-01-01 00:00:00\n")
    with path.open() as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        with locked_folder(tmp_path):
            assert is_held(tmp_path)
            assert f"pid {os.getpid()}" in path.read_text()
            with pytest.raises(LuthierError, match="held by pid"), locked_folder(tmp_path):
                """Never here."""
    assert "took over the lock" in capsys.readouterr().err


def test_a_lock_of_another_machine_is_never_taken_over(tmp_path):
    path = tmp_path / "lock"
    path.write_text(f"pid {dead_pid()} on elsewhere since 2026-01-01 00:00:00\n")
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LuthierError, match="on elsewhere") as caught, locked_folder(tmp_path):
            """Never here."""
    assert "If that process has ended, remove" in caught.value.remedy


def without_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_where_the_file_system_keeps_no_locks_the_owners_name_stands_for_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with (
        locked_folder(tmp_path),
        pytest.raises(LuthierError, match=f"held by pid {os.getpid()}"),
        locked_folder(tmp_path),
    ):
        """Never here."""
    (tmp_path / "lock").write_text(f"pid {dead_pid()} on {socket.gethostname()} since 2026-01-01 00:00:00\n")
    with locked_folder(tmp_path):
        assert "took over" in capsys.readouterr().err


def test_a_run_that_another_process_has_finished_meanwhile_is_left_as_it_is(train, data, tmp_path):
    """Both have found the folder empty; the second gets its lock when the first is done."""
    from luthier.runs.writing import target as place

    other = place.Place(folder=tmp_path / "run")
    train(data=data)
    record = (tmp_path / "run/run.json").read_text()
    with pytest.raises(LuthierError, match="in the meantime") as caught:
        place.check_unchanged(other)
    assert caught.value.exit_status == 75
    assert (tmp_path / "run/run.json").read_text() == record


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
