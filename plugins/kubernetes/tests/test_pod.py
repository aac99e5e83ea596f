"""What runs in the pod: the worker that unpacks the environment, trains, and tells by its output."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile

import luthier
import pytest
from luthier import Manager, parcel_variables, read_told
from luthier.testing import LoopbackServer

PROGRAM = """
import json, pathlib, signal, sys
run = pathlib.Path(sys.argv[1]); (run / "adapter").mkdir(parents=True)
(run / "run.json").write_text(json.dumps({"run_id": "r", "state": "running", "total_steps": 2}))
lines = [json.dumps({"step": s, "loss": 1 / s}) + chr(10) for s in (1, 2)]
(run / "metrics.jsonl").write_text("".join(lines) + '{"step": 3')
print(json.dumps({"error": {"message": "the third step was cut"}}))
sys.exit(int(sys.argv[2]))
"""


def packed(**files):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return gzip.compress(made.getvalue())


def in_pod(folder, variables, **more):
    words = [sys.executable, "-m", "luthier.builtin.workers.sent_worker", "run", str(folder)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PET_")} | variables
    return subprocess.run(words, env=environ, capture_output=True, text=True, check=False, **more)


@pytest.mark.parametrize("code", [0, 3])
def test_a_pod_tells_its_metrics_and_how_it_ended(tmp_path, code):
    launch = {"arguments": ["-S", "-c", PROGRAM, str(tmp_path / "run"), str(code)], "run": str(tmp_path / "run")}
    variables = parcel_variables(packed(launch_json=json.dumps(launch)), 100_000)
    done = in_pod(tmp_path / "work", variables | {"PET_NODE_RANK": "0"})
    assert done.stderr == ""
    told = read_told(["installing", *done.stdout.splitlines(), "luthier-told: {cut"])
    assert (done.returncode, told.code) == (code, code)
    assert told.reason == (None if code == 0 else "the third step was cut")
    assert told.results == {"adapter": str(tmp_path / "run/adapter")}
    assert [e.metrics for e in told.events] == [{"total_steps": 2}, {"step": 1, "loss": 1}, {"step": 2, "loss": 0.5}]
    assert read_told(done.stdout.splitlines()).events == told.events


def test_parcels_of_any_size_come_out_as_they_went_in():
    content = bytes(range(256)) * 2_000
    variables = parcel_variables(content, 700_000)
    assert len(variables) == 7 and all(len(value) <= 100_000 for value in variables.values())
    assert luthier.join_parcel({**variables, "PATH": "/bin"}) == content


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
        done = in_pod(tmp_path / "work", {item["name"]: item["value"] for item in trainer["env"]}, timeout=600)
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
    words = [sys.executable, "-u", "-m", "luthier.builtin.workers.sent_worker", "run", str(tmp_path / "work")]
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
