"""Full disks: a run says so, keeps its record, and refuses to begin where there is no room."""

import ctypes
import errno

import luthier
import pytest
from child_process import in_child
from luthier.checkpoint import folder as checkpoint
from luthier.disk import Reserve, is_full, write_json
from luthier.errors import LuthierError
from luthier.runs.writing.record import read_record


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
