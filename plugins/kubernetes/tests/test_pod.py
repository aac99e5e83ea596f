"""What runs in the pod of a made TrainJob: the worker, on the environment that the job has given it."""

import os
import signal
import subprocess
import sys

import luthier
import pytest
from luthier import read_told, sent_words

pytestmark = pytest.mark.slow


@pytest.fixture
def pod(manager, fake, server, rows, tmp_path, monkeypatch):
    """Submit a job with these settings; return it, and what its pod runs and in which environment."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    there = {"name": "kubernetes", "server": server.url, "token": "env:CLUSTER_TOKEN", "namespace": "team",
             "folder": str(tmp_path / "volume"), "work_folder": str(tmp_path / "work")}  # fmt: skip

    def submit(**settings):
        recipe = {"model": "demo", "adapter": "lora", "data": str(rows), "provider": there}
        job = manager.submit_sync(recipe, **settings)
        environ = {item["name"]: item["value"] for item in fake.objects[job.remote_id]["spec"]["trainer"]["env"]}
        words = [sys.executable, "-u", *sent_words("run", str(tmp_path / "work"))]
        return job, words, {**os.environ, **environ}

    return submit


def test_a_made_job_trains_in_its_pod_and_its_adapter_loads(manager, pod, fake, tmp_path):
    job, words, environ = pod(max_steps=2, **{"data.max_length": 64})
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=600)
    fake.output = list(enumerate(done.stdout.splitlines()))
    fake.set_state(job.remote_id, "Complete")
    ended = manager.wait_sync(job.id)
    assert (manager.progress_sync(job.id).step, manager.progress_sync(job.id).total_steps) == (2, 2)
    assert ended.status.result_model == str(tmp_path / "volume" / job.remote_id)
    results = read_told(done.stdout.splitlines()).results
    assert isinstance(luthier.generate(results["adapter"], "1?", base="demo", max_new_tokens=2), str)


def test_a_pod_that_is_ended_keeps_a_checkpoint(pod, tmp_path):
    job, words, environ = pod(max_steps=9_000, save_steps=9_000)
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if any("step" in event.metrics for event in read_told([line]).events):
                process.send_signal(signal.SIGTERM)
                break
        lines += process.stdout
    assert process.returncode == 143 and read_told(lines).code == 143
    assert list((tmp_path / "volume" / job.remote_id / "run" / "checkpoints").iterdir())
