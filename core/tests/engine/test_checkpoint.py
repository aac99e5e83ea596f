"""Checkpoints: whole or absent, newest first, pruned without losing the best."""

import json
import os
import resource

import pytest
import torch
from luthier.engine import checkpoint
from luthier.errors import LuthierError


def tree(step):
    return {"adapter": {"w": torch.full((50,), float(step))}, "step": step}


def test_a_checkpoint_comes_back_and_leaves_nothing_beside_it(tmp_path):
    path = checkpoint.save(tmp_path, 7, tree(7))
    assert path.name == "step-00000007"
    assert checkpoint.load(path)["step"] == 7
    assert [p.name for p in path.parent.iterdir()] == ["step-00000007"]


def test_the_newest_whole_one_is_taken_and_damaged_ones_are_named(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tree(step))
    (tmp_path / "checkpoints/step-00000003/state.json").write_text("{")
    (tmp_path / "checkpoints/step-00000002/manifest.json").unlink()
    path, held, damaged = checkpoint.newest(tmp_path)
    assert (path.name, held["step"]) == ("step-00000001", 1)
    assert [e.code for e in damaged] == ["checkpoint-corrupt"] * 2
    assert "step-00000003" in str(damaged[0])


def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_anew_in_silence(tmp_path):
    checkpoint.save(tmp_path, 1, tree(1))
    (tmp_path / "checkpoints/step-00000001/state.safetensors").write_bytes(b"")
    with pytest.raises(LuthierError) as caught:
        checkpoint.newest(tmp_path)
    assert caught.value.code == "checkpoint-corrupt"


def test_every_single_flipped_byte_is_noticed(tmp_path):
    path = checkpoint.save(tmp_path, 1, tree(1)) / "state.safetensors"
    whole = path.read_bytes()
    for place in (0, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(LuthierError):
            checkpoint.load(path.parent)


def test_a_checkpoint_of_a_newer_format_says_so(tmp_path):
    path = checkpoint.save(tmp_path, 1, tree(1)) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(LuthierError, match="newer luthier"):
        checkpoint.load(path.parent)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, tree(step))
    checkpoint.prune(tmp_path, 2, tmp_path / "checkpoints/step-00000003")
    assert [p.name[-1] for p in checkpoint.steps(tmp_path)] == ["3", "5", "6"]
    checkpoint.prune(tmp_path, None, None)
    assert len(checkpoint.steps(tmp_path)) == 3


def test_what_a_killed_process_left_half_written_is_tidied_away(tmp_path):
    (tmp_path / "checkpoints/.step-00000004.123").mkdir(parents=True)
    checkpoint.tidy(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_disk_without_room_leaves_the_earlier_checkpoints_whole(tmp_path):
    checkpoint.save(tmp_path, 1, tree(1))
    child = os.fork()
    if child == 0:  # a limit on file size is the full disk that a test may make
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            checkpoint.save(tmp_path, 2, {"adapter": {"w": torch.zeros(100_000)}})
        except LuthierError as error:
            os._exit(40 if error.code == "disk-full" else 41)
        finally:
            os._exit(42)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 40
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path)[1]["step"] == 1
