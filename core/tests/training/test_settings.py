"""Settings that other tests only pass on: what each changes in a run."""

import json

import pytest
import torch
from luthier.errors import LuthierError
from luthier.runs.writing.record import read_record
from luthier.step.schedule.learning_rates import schedule_rates


def learning_rates(folder):
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("given", "warmup", "kwargs"),
    [
        ({"warmup_steps": 2}, 2, {}),
        ({"warmup_ratio": 0.5}, 3, {}),
        ({"lr_scheduler_kwargs": {"min_lr_ratio": 0.5, "decay_steps": 3}}, 0, {"min_lr_ratio": 0.5, "decay_steps": 3}),
    ],
)
def test_the_schedules_settings_reach_every_step(train, tmp_path, given, warmup, kwargs):
    train(lr_scheduler_type="cosine", num_train_epochs=2, **given)
    assert learning_rates(tmp_path / "run") == pytest.approx(schedule_rates("cosine", 1e-2, 6, warmup, kwargs))


def test_the_seed_changes_the_order_of_the_rows(train, tmp_path):
    one, other = (train(seed=s, output_dir=tmp_path / str(s)) for s in (0, 1))
    assert one.loss_history != other.loss_history
    assert read_record(tmp_path / "1")["seed"] == 1


def test_the_runs_name_is_the_folders_where_none_is_given(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(run_name="../first try", output_dir=None, max_steps=1)
    assert run.output_path.resolve() == tmp_path / "runs" / "first-try"


def test_a_warm_up_that_never_ends_is_said(train, tmp_path, capsys):
    train(warmup_steps=50, max_steps=2)
    assert "the warm-up is longer than the run" in capsys.readouterr().err


@pytest.mark.parametrize(("wanted", "written"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_files_have_the_dtype_of_the_base_checkpoint_or_the_one_asked_for(
    train, tmp_path, model_folder, wanted, written
):
    from safetensors.torch import load_file

    train(model={"name_or_path": str(model_folder), "dtype": "bfloat16"}, max_steps=1, save_dtype=wanted)
    assert {t.dtype for t in load_file(tmp_path / "run/model/model.safetensors").values()} == {written}


def test_a_device_that_is_not_here_is_refused_before_a_folder_appears(train, tmp_path):
    with pytest.raises(LuthierError) as caught:
        train(device="cuda:99")
    assert caught.value.code == "device-unavailable"
    assert not (tmp_path / "run").exists()


def test_merge_writes_the_merged_model_beside_the_artifact(train, tmp_path):
    run = train(merge=True, max_steps=1, adapter="lora")
    assert run.merged == tmp_path / "run" / "merged"
    assert (run.merged / "config.json").is_file()
