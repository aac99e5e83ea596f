"""Checkpoints: whole or absent, newest first, pruned without losing the best, of every format there has been."""

import json
import os
import resource
import shutil
import signal
from importlib import metadata
from pathlib import Path

import luthier
import pytest
import torch
from luthier.checkpoint import folder as checkpoint
from luthier.checkpoint import migrations
from luthier.errors import LuthierError
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model

OLD = Path(__file__).parent / "data" / "format-1" / "step-00000003"


def tree(step):
    return {"adapter": {"w": torch.full((50,), float(step))}, "step": step}


def test_a_checkpoint_comes_back_and_leaves_nothing_beside_it(tmp_path):
    path = checkpoint.save(tmp_path, 7, tree(7))
    assert path.name == "step-00000007"
    assert checkpoint.load_checkpoint(path)["step"] == 7
    assert [p.name for p in path.parent.iterdir()] == ["step-00000007"]


def test_the_newest_whole_one_is_taken_and_damaged_ones_are_named(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tree(step))
    (tmp_path / "checkpoints/step-00000003/state.json").write_text("{")
    (tmp_path / "checkpoints/step-00000002/manifest.json").unlink()
    path, held, damaged = checkpoint.newest_checkpoint(tmp_path)
    assert (path.name, held["step"]) == ("step-00000001", 1)
    assert [e.code for e in damaged] == ["checkpoint-corrupt"] * 2
    assert "step-00000003" in str(damaged[0])


def test_a_run_whose_every_checkpoint_is_damaged_does_not_begin_anew_in_silence(tmp_path):
    checkpoint.save(tmp_path, 1, tree(1))
    (tmp_path / "checkpoints/step-00000001/state.safetensors").write_bytes(b"")
    with pytest.raises(LuthierError) as caught:
        checkpoint.newest_checkpoint(tmp_path)
    assert caught.value.code == "checkpoint-corrupt"
    assert "step-00000001" in str(caught.value) and "--fresh" in caught.value.remedy


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_every_single_flipped_byte_of_every_file_is_noticed(tmp_path, name):
    path = checkpoint.save(tmp_path, 1, tree(1)) / name
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(LuthierError) as caught:
            checkpoint.load_checkpoint(path.parent)
        assert caught.value.code == "checkpoint-corrupt"


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_whatever_was_cut_off_of_whichever_file_the_one_before_is_used_and_it_is_said(tmp_path, name):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, tree(step)) / name
    whole = path.read_bytes()
    for length in range(0, len(whole), 2):
        path.write_bytes(whole[:length])
        folder, held, damaged = checkpoint.newest_checkpoint(tmp_path)
        assert (folder.name, held["step"]) == ("step-00000001", 1)
        assert "step-00000002" in str(damaged[0])
    path.unlink()
    assert checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 1


def test_a_checkpoint_of_a_newer_format_says_so(tmp_path):
    path = checkpoint.save(tmp_path, 1, tree(1)) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 99}))
    told = f"written by luthier {metadata.version('luthier')}, in format 99.*Use luthier .* or newer"
    for read in (checkpoint.load_checkpoint, checkpoint.require_checkpoint):
        with pytest.raises(LuthierError, match=told) as caught:
            read(path.parent)
        assert caught.value.code == "format-newer"


def test_a_checkpoint_of_a_newer_format_is_neither_set_aside_nor_trained_past(tmp_path):
    for step in (1, 2, 3):
        path = checkpoint.save(tmp_path, step, tree(step)) / "manifest.json"
        if step > 1:
            path.write_text(json.dumps({"format": 99, "luthier": "9.9", "of": "another layout"}))
    held = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for read in (checkpoint.newest_checkpoint, checkpoint.known_checkpoints):
        with pytest.raises(LuthierError, match=r"9\.9.*99.*9\.9") as caught:
            read(tmp_path)
        assert caught.value.code == "format-newer" and f"{tmp_path}/checkpoints/step-" in caught.value.where
    assert held == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_every_format_up_to_todays_has_its_migration():
    assert sorted(migrations.MIGRATIONS) == list(range(1, checkpoint.FORMAT))


def test_a_checkpoint_of_format_1_holds_in_todays_layout_what_it_held():
    tree = checkpoint.load_checkpoint(OLD)
    assert tree.keys() == {"adapter", "optimizer", "parts", "callbacks", "tally"}
    assert (tree["parts"], tree["callbacks"].keys()) == ({}, {"early_stopping"})
    assert tree["optimizer"]["host"]["0"] == ["step"]
    assert (tree["tally"]["step"], len(tree["tally"]["losses"])) == (3, 3)


def test_a_run_goes_on_from_a_checkpoint_of_format_1_as_if_it_had_never_stopped(tmp_path, rows):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = save_tiny_model(tmp_path / "model", **small, num_key_value_heads=1, tie_word_embeddings=True)
    shared = {
        **{"model": str(model), "data": rows, "eval_data": rows[:4], "eval_steps": 2, "global_batch_size": 8},
        **{
            "learning_rate": 1e-2,
            "num_train_epochs": 2,
            "exact_callbacks": [{"name": "early_stopping", "patience": 50}],
        },
    }
    straight = luthier.train(**shared, output_dir=tmp_path / "straight")
    with expect_error("checkpoint-other", "format-1/step-00000003"):  # of another machine's folders
        luthier.train(**shared, output_dir=tmp_path / "run", resume=OLD)
    resumed = luthier.train(**shared, output_dir=tmp_path / "run", resume=OLD, allow_changed="settings")
    assert resumed.loss_history == pytest.approx(straight.loss_history, rel=1e-4)
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_another_writer_fills_the_folder_and_the_rest_is_the_same(tmp_path):
    aside = checkpoint.prepare_folder(tmp_path, 8)
    (aside / "shards").mkdir()
    for rank in range(2):
        (aside / "shards" / f"rank-{rank}.safetensors").write_bytes(bytes([rank]) * 100)
    assert checkpoint.list_checkpoints(tmp_path) == []
    folder = checkpoint.commit_folder(aside, {"recipe": "r"})
    assert checkpoint.list_checkpoints(tmp_path) == [folder]
    assert checkpoint.verify(folder)["files"].keys() == {"shards/rank-0.safetensors", "shards/rank-1.safetensors"}
    assert checkpoint.require_checkpoint(folder) == {"recipe": "r"}
    (folder / "shards/rank-1.safetensors").write_bytes(b"")
    with pytest.raises(LuthierError, match="rank-1"):
        checkpoint.verify(folder)


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path):
    folder = checkpoint.save(tmp_path, 1, tree(1))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}


def test_what_gave_way_to_a_checkpoint_that_a_kill_cut_off_is_put_back(tmp_path):
    old = checkpoint.save(tmp_path, 3, tree(3))
    old.rename(old.with_name(".step-00000003.replaced"))  # and here it was killed
    checkpoint.tidy_checkpoints(tmp_path)
    assert checkpoint.load_checkpoint(old)["step"] == 3
    shutil.copytree(old, old.with_name(".step-00000003.replaced"))  # or here, after the second renaming
    checkpoint.tidy_checkpoints(tmp_path)
    assert [p.name for p in old.parent.iterdir()] == [old.name]


def test_the_same_step_may_be_saved_again(tmp_path):
    checkpoint.save(tmp_path, 3, tree(1))
    folder = checkpoint.save(tmp_path, 3, tree(3))
    assert checkpoint.load_checkpoint(folder)["step"] == 3
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == [7, 99_999_999, 100_000_000]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, tree(step))
    checkpoint.prune_checkpoints(tmp_path, 2, tmp_path / "checkpoints/step-00000003")
    assert [p.name[-1] for p in checkpoint.list_checkpoints(tmp_path)] == ["3", "5", "6"]
    checkpoint.prune_checkpoints(tmp_path, None, None)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 3


def test_what_a_killed_process_left_half_written_is_tidied_away(tmp_path):
    (tmp_path / "checkpoints/.step-00000004.123").mkdir(parents=True)
    checkpoint.tidy_checkpoints(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_disk_without_room_leaves_the_earlier_checkpoints_whole(tmp_path):
    checkpoint.save(tmp_path, 1, tree(1))
    child = os.fork()
    if child == 0:  # a limit on file size is the full disk that a test may make
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
    assert checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 1
