"""The provider `local`: real runs in worker processes, followed, cancelled, adopted, and told how they ended."""

import asyncio
import contextlib
import json
import os
import signal
import time
from pathlib import Path

import luthier
import pytest
from luthier import JobState, LuthierError, Manager
from luthier.builtin.workers.local_worker import WORKER, is_worker_alive, read_worker_note, run_worker, write_note
from luthier.runs.writing.lock import locked_folder
from luthier.testing import expect_error


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{i} and {j} is", "completion": str(i + j)} for i in range(4) for j in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def manager(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = Manager(tmp_path / "store")
    yield made
    for job in made.list_sync():  # no test leaves a process behind
        made.cancel_sync(job.id)
        deadline = time.monotonic() + 30
        while is_worker_alive(job.spec.folder) and time.monotonic() < deadline:
            time.sleep(0.05)
    made.close()


def recipe(rows, tmp_path, **more):
    return {"model": "demo", "data": str(rows), "adapter": "lora", "output_dir": str(tmp_path / "run"), **more}


def until(true, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it has not come in time"
        time.sleep(0.05)


def test_a_run_of_this_machine_is_a_job_whose_adapter_loads(manager, rows, tmp_path):
    job = manager.submit_sync(recipe(rows, tmp_path, max_steps=3))
    assert job.spec.provider == "local"
    assert not job.is_final
    told = []
    ended = manager.wait_sync(job.id, listener=told.append)
    assert (ended.state, ended.reason) == (JobState.COMPLETED, None)
    assert [e.metrics["step"] for e in told] == [1.0, 2.0, 3.0]
    progress, metrics = manager.progress_sync(job.id), manager.metrics_sync(job.id)
    assert (progress.step, progress.total_steps) == (3, 3)
    assert metrics.train_loss == progress.loss == told[-1].metrics["loss"]
    assert metrics.duration > 0 and metrics.tokens > 0 and metrics.cost == 0
    artifact = manager.download_sync(job.id, tmp_path / "got")
    assert (artifact.kind, artifact.base_model, artifact.adapter_config["peft_type"]) == ("adapter", "demo", "LORA")
    assert set(artifact.files) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert isinstance(luthier.generate(tmp_path / "got", "1 and 1 is", base="demo", max_new_tokens=2), str)
    assert json.loads((tmp_path / "got/artifact.json").read_text())["files"] == artifact.files


def test_another_manager_adopts_a_run_and_cancel_ends_it_within_a_step(manager, rows, tmp_path):
    job = manager.submit_sync(recipe(rows, tmp_path, max_steps=5_000))
    other = Manager(tmp_path / "store")
    until(lambda: other.progress_sync(job.id).step)
    assert other.status_sync(job.id).state == JobState.RUNNING
    last = other.progress_sync(job.id).step
    other.cancel_sync(job.id)
    ended = other.wait_sync(job.id, timeout=120)
    assert ended.state == JobState.CANCELED
    assert "checkpoint is kept" in ended.reason
    assert list((tmp_path / "run/checkpoints").iterdir())
    assert last < other.progress_sync(job.id).step < 5_000
    other.close()


@pytest.mark.parametrize("held", [True, False])
def test_a_folder_of_another_run_is_refused_before_there_is_a_job(manager, rows, tmp_path, held):
    path = tmp_path / "run"
    with locked_folder(path) if held else contextlib.nullcontext():
        if not held:
            record = {"recipe_hash": "another", "run_id": "r1", "state": "completed", "settings": {}}
            path.mkdir()
            (path / "run.json").write_text(json.dumps(record))
        with pytest.raises(LuthierError) as caught:
            manager.submit_sync(recipe(rows, tmp_path, max_steps=3))
    assert caught.value.code == ("run-folder-locked" if held else "run-folder-other")
    assert manager.list_sync() == []


def test_a_worker_that_was_killed_is_a_job_that_failed(manager, rows, tmp_path):
    job = manager.submit_sync(recipe(rows, tmp_path, max_steps=5_000))
    note = read_worker_note(job.spec.folder / WORKER)
    os.killpg(note["pid"], signal.SIGKILL)
    ended = manager.wait_sync(job.id, timeout=120)
    assert (ended.state, ended.raw_state) == (JobState.FAILED, "lost")
    assert "killed" in ended.reason


def test_why_a_run_failed_is_told_in_its_own_words(manager, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    job = manager.submit_sync(recipe(tmp_path / "bad.jsonl", tmp_path))
    ended = manager.wait_sync(job.id, timeout=120)
    assert ended.state == JobState.FAILED
    assert "bad.jsonl:2" in ended.reason


def test_rows_that_are_given_as_objects_are_written_with_their_hash_before_the_job(manager, tmp_path):
    given = [{"prompt": "a", "completion": "b"}] * 2
    job = manager.submit_sync({"model": "demo", "output_dir": str(tmp_path / "run"), "max_steps": 1}, data=given)
    (file,) = job.spec.folder.glob("given-training-*.jsonl")
    assert [json.loads(line) for line in file.read_text().splitlines()] == given
    assert str(file) in (job.spec.folder / "recipe.yaml").read_text()


def test_a_second_worker_in_a_folder_ends_at_once(tmp_path):
    write_note(tmp_path / WORKER, {"pid": 1, "started": 0.0, "run": str(tmp_path)})
    assert run_worker(tmp_path) == 0
    assert not (tmp_path / "exit.json").exists()


def test_a_worker_that_a_dead_manager_started_is_found(manager, rows, tmp_path):
    """The manager may die between the start of the worker and the note that the job was created."""
    job = manager.submit_sync(recipe(rows, tmp_path, max_steps=1))
    part = luthier.provider("local")
    (found,) = asyncio.run(part.find(job.spec, {}))
    assert found.remote_id == job.remote_id == str(Path(job.spec.folder))


def test_its_options_are_refused_where_nothing_is_submitted(rows, tmp_path):
    settings = recipe(rows, tmp_path, provider={"name": "local", "nproc_per_node": "2"})
    with expect_error("part-unsupported", "provider") as caught:
        luthier.plan(settings)
    assert caught.value.where == "provider"


@pytest.mark.slow
def test_a_job_of_two_processes_goes_through_torchrun(manager, rows, tmp_path):
    settings = recipe(rows, tmp_path, max_steps=2, provider={"name": "local", "nproc_per_node": "2"})
    job = manager.submit_sync(settings)
    assert manager.wait_sync(job.id, timeout=300).state == JobState.COMPLETED
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == 2
