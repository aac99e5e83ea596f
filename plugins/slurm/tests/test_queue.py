"""Runs in a queue: commands of Slurm's names as the far side, one of which trains."""

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import luthier
import pytest
from luthier import JobState, LuthierError, Manager, ProviderError
from luthier.testing import expect_error
from luthier_slurm import Slurm


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder of the fake's jobs, its commands before all others on the path."""
    commands, jobs = tmp_path / "bin", tmp_path / "queue"
    commands.mkdir()
    jobs.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel"):
        text = (Path(__file__).parent / "slurm_commands.py").read_text()
        (commands / name).write_text(text.replace("#!/usr/bin/env python3", f"#!{sys.executable} -S"))
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(jobs))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return jobs


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": str(i)}) + "\n" for i in range(12)))
    return path


def submitted(manager, tmp_path, rows, given=None, **more):
    provider = {"name": "slurm", "folder": str(tmp_path / "shared"), **(given or {})}
    return manager.submit_sync({"model": "demo", "data": str(rows), "adapter": "lora", "provider": provider}, **more)


def queued(cluster):
    return [json.loads(path.read_text()) for path in sorted(cluster.glob("*.json"))]


def test_a_waiting_job_is_asked_for_as_it_was_set_and_taken_back(manager, cluster, tmp_path, rows, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_FAULT", "hold")
    given = {
        "partition": "gpu",
        "gpus": "a100:2",
        "time_limit": "4:00:00",
        "memory": "32G",
        "cpus_per_task": 8,
        "account": "me",
    }
    job = submitted(manager, tmp_path, rows, given)
    assert (job.state, job.raw_state, job.phase) == (JobState.PENDING, "PENDING", "queued")
    (held,) = queued(cluster)
    assert set(held["words"]) == {
        "--parsable", "--nodes=1", "--ntasks=1", f"--job-name=luthier-{job.id}", f"--chdir={job.remote_id}",
        f"--output={job.remote_id}/slurm.log", "--partition=gpu", "--gpus=a100:2", "--time=4:00:00", "--mem=32G",
        "--cpus-per-task=8", "--account=me",
    }  # fmt: skip
    assert manager.events_sync(job.id) == []
    manager.cancel_sync(job.id)
    assert queued(cluster)[0]["state"] == "CANCELLED"
    assert manager.wait_sync(job.id).state == JobState.CANCELED


def test_an_answer_that_came_too_late_makes_no_second_job(manager, cluster, tmp_path, rows, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_FAULT", "timeout")
    text = Path(os.environ["PATH"].split(":")[0]) / "sbatch"
    text.write_text(text.read_text().replace('if FAULT != "hold":', "if False:"))  # made, held, and not told
    job = submitted(manager, tmp_path, rows)
    assert (job.state, len(queued(cluster))) == (JobState.PENDING, 1)


def test_a_job_that_the_queue_has_lost_has_failed_and_says_where_to_look(manager, cluster, tmp_path, rows, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_FAULT", "hold")
    job = submitted(manager, tmp_path, rows)
    (held,) = queued(cluster)
    for word, state in (("NODE_FAIL", JobState.FAILED), ("TIMEOUT", JobState.FAILED), ("PREHEATING", JobState.UNKNOWN)):
        (cluster / "101.json").write_text(json.dumps({**held, "state": word}))
        part = luthier.provider("slurm", folder=str(tmp_path / "shared"))
        found = asyncio.run(part.status(job.remote_id))
        assert (found.state, found.raw_state) == (state, word)
    (cluster / "101.json").unlink()
    monkeypatch.setenv("FAKE_SLURM_FAULT", "no accounts")
    ended = manager.wait_sync(job.id)
    assert ended.state == JobState.FAILED and "slurm.log" in ended.reason


@pytest.mark.parametrize(("fault", "kind", "told"), [("refused", "invalid", "partition"), ("qos", "quota", "QOSMax")])
def test_what_sbatch_refuses_is_told_in_its_words(manager, cluster, tmp_path, rows, monkeypatch, fault, kind, told):
    monkeypatch.setenv("FAKE_SLURM_FAULT", fault)
    with pytest.raises(ProviderError, match=told) as caught:
        submitted(manager, tmp_path, rows)
    assert caught.value.kind == kind and queued(cluster) == []


def test_without_slurm_that_is_told(manager, tmp_path, rows, monkeypatch):
    shutil_which = shutil.which("sbatch")
    assert shutil_which is None
    with expect_error("dependency-missing", "slurm: sbatch"):
        submitted(manager, tmp_path, rows)


@pytest.mark.parametrize("name", ["partition", "account", "gpus", "memory", "time_limit"])
def test_a_word_that_could_be_an_option_or_a_command_is_refused(name):
    for value in ("-x", "a b", "$(x)", ""):
        with pytest.raises(LuthierError, match=f"Slurm.{name}"):
            Slurm(**{name: value})


@pytest.mark.slow
def test_a_job_of_the_queue_trains_and_its_adapter_loads(cluster, tmp_path, rows):
    manager = Manager(tmp_path / "store")
    job = submitted(manager, tmp_path, rows, max_steps=2)
    ended = manager.wait_sync(job.id, timeout=600)
    assert (ended.state, ended.reason) == (JobState.COMPLETED, None)
    assert manager.progress_sync(job.id).step == 2
    manager.download_sync(job.id, tmp_path / "got")
    assert isinstance(luthier.generate(tmp_path / "got", "1 is", base="demo", max_new_tokens=2), str)
    long = submitted(manager, tmp_path, rows, max_steps=5_000)
    while not manager.progress_sync(long.id).step:
        pass
    manager.cancel_sync(long.id)
    ended = manager.wait_sync(long.id, timeout=600)
    assert ended.state == JobState.CANCELED and "checkpoint is kept" in ended.reason
    manager.close()
