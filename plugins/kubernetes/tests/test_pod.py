"""What runs in the pod of a made TrainJob: the worker, on the environment that the job has given it."""

import os
import signal
import subprocess
import sys

import luthier
import pytest
from luthier import Manager, read_told, sent_words
from luthier.testing import LoopbackServer


@pytest.mark.slow
def test_a_made_job_trains_in_its_pod_and_its_adapter_loads(fake, tmp_path, rows, monkeypatch):
    monkeypatch.setenv("CLUSTER_TOKEN", "t0ken-of-the-cluster")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manager = Manager(tmp_path / "store")
    server = LoopbackServer(fake.answer)
    there = {"name": "kubernetes", "server": server.url, "token": "env:CLUSTER_TOKEN", "namespace": "team"}
    with server.running():
        recipe = {"model": "demo", "adapter": "lora", "max_steps": 2, "data": {"train": str(rows), "max_length": 64}}
        job = manager.submit_sync(
            {**recipe, "provider": {**there, "folder": str(tmp_path / "volume"), "work_folder": str(tmp_path / "work")}}
        )
        trainer = fake.objects[job.remote_id]["spec"]["trainer"]
        environ = {**os.environ, **{item["name"]: item["value"] for item in trainer["env"]}}
        words = [sys.executable, *sent_words("run", str(tmp_path / "work"))]
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=600)
        fake.output = list(enumerate(done.stdout.splitlines()))
        fake.set_state(job.remote_id, "Complete")
        ended = manager.wait_sync(job.id)
        assert (manager.progress_sync(job.id).step, manager.progress_sync(job.id).total_steps) == (2, 2)
        assert ended.status.result_model == str(tmp_path / "volume" / job.remote_id)
    results = read_told(done.stdout.splitlines()).results
    assert isinstance(luthier.generate(results["adapter"], "1?", base="demo", max_new_tokens=2), str)
    manager.close()


@pytest.mark.slow
def test_a_pod_that_is_ended_keeps_a_checkpoint(fake, tmp_path, rows, monkeypatch):
    monkeypatch.setenv("CLUSTER_TOKEN", "t0ken-of-the-cluster")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manager = Manager(tmp_path / "store")
    server = LoopbackServer(fake.answer)
    there = {"name": "kubernetes", "server": server.url, "token": "env:CLUSTER_TOKEN", "namespace": "team"}
    with server.running():
        recipe = {"model": "demo", "adapter": "lora", "data": str(rows), "max_steps": 9_000, "save_steps": 9_000}
        job = manager.submit_sync(
            {**recipe, "provider": {**there, "folder": str(tmp_path / "volume"), "work_folder": str(tmp_path / "work")}}
        )
    manager.close()
    environ = {item["name"]: item["value"] for item in fake.objects[job.remote_id]["spec"]["trainer"]["env"]}
    words = [sys.executable, "-u", *sent_words("run", str(tmp_path / "work"))]
    with subprocess.Popen(words, env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True) as pod:
        lines = []
        for line in pod.stdout:
            lines.append(line)
            if any("step" in event.metrics for event in read_told([line]).events):
                pod.send_signal(signal.SIGTERM)
                break
        lines += pod.stdout
    assert pod.returncode == 143 and read_told(lines).code == 143
    assert list((tmp_path / "volume" / job.remote_id / "run" / "checkpoints").iterdir())
