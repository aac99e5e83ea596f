"""The lock of a run's folder: its owner, those of the dead, and file systems without locks."""

import errno
import fcntl
import os
import socket
from pathlib import Path

import pytest
from luthier.builtin.workers.local_worker import is_worker_alive
from luthier.runs.run_folder import is_held
from luthier.runs.writing.lock import locked_folder
from luthier.testing import expect_error


def test_the_lock_names_its_owner_and_is_free_afterwards(tmp_path):
    with locked_folder(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"pid {os.getpid()} on {socket.gethostname()}")
        assert is_held(tmp_path)
        with expect_error("run-folder-locked", str(tmp_path), str(os.getpid())), locked_folder(tmp_path):
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
            with expect_error("run-folder-locked", str(tmp_path)), locked_folder(tmp_path):
                """Never here."""
    assert "took over the lock" in capsys.readouterr().err


def test_a_lock_of_another_machine_is_never_taken_over(tmp_path):
    path = tmp_path / "lock"
    path.write_text(f"pid {dead_pid()} on elsewhere since 2026-01-01 00:00:00\n")
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with expect_error("run-folder-locked", str(tmp_path)) as caught, locked_folder(tmp_path):
            """Never here."""
    assert "If that process has ended, remove" in caught.value.remedy


def without_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_where_the_file_system_keeps_no_locks_the_owners_name_stands_for_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with (
        locked_folder(tmp_path),
        expect_error("run-folder-locked", str(tmp_path), f" {os.getpid()} "),
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
    with expect_error("run-folder-locked", "run") as caught:
        place.check_unchanged(other)
    assert caught.value.exit_status == 75
    assert (tmp_path / "run/run.json").read_text() == record


def as_nfs_locks(fd, operation):
    """Linux' NFS client locks a range of bytes, exclusively only where the file is open for writing (man 2 flock)."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    LOCK(fd, operation)


LOCK = fcntl.flock


def test_over_nfs_a_living_worker_lives_and_a_running_run_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", as_nfs_locks)
    with locked_folder(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    with (tmp_path / "worker.lock").open("a") as lock:
        assert not is_worker_alive(tmp_path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_worker_alive(tmp_path)


@pytest.mark.parametrize(("host", "held"), [(socket.gethostname(), False), ("elsewhere", True)])
def test_of_a_run_that_may_only_be_read_over_nfs_the_owners_text_decides(tmp_path, monkeypatch, host, held):
    monkeypatch.setattr(fcntl, "flock", as_nfs_locks)
    monkeypatch.setattr(Path, "open", refuse_writing)
    with (tmp_path / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for pid, lives in ((os.getpid(), True), (dead_pid(), held)):
            (tmp_path / "lock").write_text(f"pid {pid} on {host} since 2026-01-01 00:00:00\n")
            assert is_held(tmp_path) == lives


def test_of_a_run_that_may_only_be_read_here_the_lock_itself_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", refuse_writing)
    with (tmp_path / "lock").open("a") as lock:
        assert not is_held(tmp_path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_held(tmp_path)


def refuse_writing(path, mode="r", *arguments, open_file=Path.open, **named):
    """As a file of another user is opened; root may write every file."""
    if "+" in mode:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return open_file(path, mode, *arguments, **named)
