"""Submissions: what is asked for, how answers are read, and a real head of Ray on this machine."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import attrs
import luthier
import pytest
from luthier import JobState, LuthierError, Manager, ProviderError
from luthier.testing import Fault, Reply
from luthier_ray import Ray
from luthier_ray.train_driver import read_ending
from luthier_ray.worker_plan import WorkerPlan, read_plan


def submitted(manager, url, rows, given=None, **more):
    there = {"name": "ray", "address": url, "token": "env:RAY_TOKEN", **(given or {})}
    return manager.submit_sync({"model": "demo", "data": str(rows), "provider": there, **more})


def test_a_submission_asks_for_what_was_set_and_names_its_plugins_by_version(manager, fake, server, rows):
    given = {"gpus": 2, "cpus": 8, "nproc_per_node": "2", "folder": "/shared"}
    job = submitted(manager, server.url, rows, given, adapter="slao")
    made = fake.submissions[job.remote_id]
    assert (made["submission_id"], made["metadata"]) == (f"luthier-{job.id}", {"luthier_job": job.id})
    assert (made["entrypoint_num_gpus"], made["entrypoint_num_cpus"]) == (2, 8)
    packages = [f"luthier[local]=={luthier.__version__}", f"luthier-slao=={luthier.__version__}"]
    assert made["runtime_env"]["pip"] == packages
    assert made["entrypoint"].endswith(f"sent_worker run /shared/{job.remote_id} parcel.tar.gz")
    launch = json.loads((job.spec.folder / "parcel" / "launch.json").read_text())
    assert launch["arguments"][-2:] == ["--nproc-per-node", "2"]
    plain = fake.submissions[submitted(manager, server.url, rows, {"install": False}).remote_id]
    assert "pip" not in plain["runtime_env"] and "entrypoint_num_gpus" not in plain


def test_a_reading_goes_on_where_one_ended(manager, fake, server, rows):
    job = submitted(manager, server.url, rows)
    assert [e.metrics["step"] for e in manager.events_sync(job.id)] == [1, 2, 3, 4]
    fake.output[job.remote_id] += "a line of the program's own\n" + fake.told_step(5)
    assert [e.metrics["step"] for e in manager.events_sync(job.id)] == [1, 2, 3, 4, 5]


def test_why_a_job_failed_is_told_by_its_own_output(manager, fake, server, rows):
    job = submitted(manager, server.url, rows)
    fake.output[job.remote_id] += 'luthier-told: {"at": 1, "code": 3, "reason": "the disk is full", "results": {}}\n'
    fake.set_state(job.remote_id, "FAILED")
    assert manager.status_sync(job.id).reason == "the disk is full"


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_job_whose_output_is_gone_has_failed_all_the_same(manager, fake, server, rows, status):
    server.faults = [
        Fault(kind="answer", method="GET", path="/logs$", reply=Reply(status=status, body=b"gone"), times=99)
    ]
    for look in (manager.status_sync, manager.wait_sync):
        job = submitted(manager, server.url, rows)
        fake.set_state(job.remote_id, "FAILED")
        found = look(job.id)
        assert found.state == JobState.FAILED
        assert found.reason.startswith(
            "Job entrypoint command failed with exit code 3; its output cannot be read: 'gone'"
        )


def test_a_result_comes_by_a_job_of_its_own_that_is_taken_away(manager, fake, server, rows, tmp_path):
    job = submitted(manager, server.url, rows, {"gpus": 8, "cpus": 32})
    fake.set_state(job.remote_id, "SUCCEEDED")
    manager.wait_sync(job.id)
    got = manager.download_sync(job.id, tmp_path / "got")
    assert (got.kind, list(got.files)) == ("adapter", ["adapter_model.safetensors"])
    assert list(fake.submissions) == [job.remote_id]
    (gave,) = [r.json for r in server.requests if r.method == "POST" and "luthier-give" in r.body.decode()]
    assert set(gave) == {"submission_id", "entrypoint", "runtime_env"}  # whatever the training was given
    server.faults = [Fault(kind="answer", method="GET", path="give.*/logs$", reply=Reply(body={"logs": ""}))]
    with pytest.raises(ProviderError, match="luthier-give"):
        manager.download_sync(job.id, tmp_path / "none")


@pytest.mark.parametrize("at", ["/logs$", "[0-9a-f]$"], ids=["its output", "its state"])
def test_a_job_that_cannot_give_its_result_is_taken_away_too(manager, fake, server, rows, tmp_path, at):
    job = submitted(manager, server.url, rows)
    fake.set_state(job.remote_id, "SUCCEEDED")
    manager.wait_sync(job.id)
    gone = Reply(status=403, body=b"forbidden")
    server.faults = [Fault(kind="answer", method="GET", path=f"luthier-give.*{at}", reply=gone, times=9)]
    fake.give_state = "SUCCEEDED" if at == "/logs$" else "RUNNING"  # Ray deletes none that runs
    with pytest.raises(ProviderError, match="forbidden"):
        manager.download_sync(job.id, tmp_path / "none")
    assert list(fake.submissions) == [job.remote_id]


def test_a_damaged_result_leaves_nothing_behind(manager, fake, server, rows, tmp_path):
    job = submitted(manager, server.url, rows)
    fake.set_state(job.remote_id, "SUCCEEDED")
    manager.wait_sync(job.id)
    for given in ("AAAA", "no base64!"):
        fake.given = given
        with pytest.raises(LuthierError, match="damaged|unpacked"):
            manager.download_sync(job.id, tmp_path / "damaged")
        assert [path for path in tmp_path.rglob("*") if ".result.tar" in path.name] == []
    assert list(fake.submissions) == [job.remote_id]


def test_the_check_tells_the_version(server, manager):
    part = luthier.provider("ray", address=server.url, token="env:RAY_TOKEN")
    assert asyncio.run(part.check()) == {"ray": "2.60.0", "api": "4"}


@pytest.mark.parametrize("given", [{"folder": "here"}, {"folder": "/a/../b"}, {"token": "literal"}], ids=str)
def test_options_that_the_cluster_would_misread_are_refused(given):
    with pytest.raises(LuthierError):
        Ray(**given)


def test_several_workers_are_ray_trains_and_ask_for_nothing_themselves(manager, fake, server, rows):
    given = {"workers": 3, "min_workers": 2, "max_restarts": 4, "gpus": 1, "cpus": 8, "folder": "/shared"}
    job = submitted(manager, server.url, rows, given)
    made = fake.submissions[job.remote_id]
    assert "entrypoint_num_gpus" not in made and "entrypoint_num_cpus" not in made
    assert made["runtime_env"]["pip"][-1] == f"luthier-ray[train]=={luthier.__version__}"
    launch = json.loads((job.spec.folder / "parcel" / "launch.json").read_text())
    python, driver, plan, *rest = launch["arguments"]
    assert (python, driver, rest) == (
        "-m",
        "luthier_ray.train_driver",
        [f"/shared/{job.remote_id}/recipe.yaml", "--json"],
    )
    assert find_spec(driver) is not None
    assert read_plan(plan) == WorkerPlan(
        name=job.remote_id, workers=3, min_workers=2, max_restarts=4, resources={"CPU": 8, "GPU": 1}
    )
    assert read_plan(plan).wanted == (2, 3)
    alike = attrs.evolve(read_plan(plan), min_workers=3)
    assert (alike.wanted, attrs.evolve(alike, min_workers=None).wanted) == (3, 3)


@pytest.mark.parametrize(("given", "place"), [
    ({"workers": 2, "nproc_per_node": "2"}, "nproc_per_node"), ({"min_workers": 1}, "min_workers"),
    ({"max_restarts": 1}, "max_restarts"), ({"workers": 2, "min_workers": 3}, "min_workers"),
    ({"workers": 0}, "workers"),
], ids=str)  # fmt: skip
def test_workers_that_nothing_would_read_are_refused(given, place):
    with pytest.raises(LuthierError) as caught:
        Ray(**given)
    assert caught.value.where == f"Ray.{place}"


def test_a_run_is_explained_by_the_process_that_failed_of_itself(tmp_path, capfd):
    assert read_ending(tmp_path) == ""
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    (ranks / "0.err").write_text("Killed")
    assert read_ending(tmp_path) == "" and "Killed" in capfd.readouterr().err
    (ranks / "0.out").write_text('{"error": {"code": "distributed-lost", "message": "another"}}')
    (ranks / "1.out").write_text("")
    assert "distributed-lost" in read_ending(tmp_path)
    (ranks / "2.out").write_text('{"error": {"code": "data-row", "message": "its own"}}\n')
    assert json.loads(read_ending(tmp_path))["error"]["message"] == "its own"


@pytest.fixture
def head():
    """A real head of Ray, with a dashboard on a port of this machine."""
    if find_spec("ray") is None or shutil.which("ray", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("ray[default] is not installed")
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # sockets: short
        words = ["ray", "start", "--head", "--num-cpus=2", "--dashboard-port=8299", "--port=6399", "--block",
                 f"--temp-dir={folder}", "--disable-usage-stats"]  # fmt: skip
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ) as process:
            wait_for_dashboard("http://127.0.0.1:8299", time.monotonic() + 120)
            yield "http://127.0.0.1:8299"
            process.send_signal(signal.SIGTERM)


def wait_for_dashboard(address, until):
    """Ask until it answers: it starts after the runtime."""
    while True:
        try:
            return asyncio.run(luthier.provider("ray", address=address).check())
        except ProviderError as error:
            assert error.kind in ("network", "lost", "server") and time.monotonic() < until, error


@pytest.mark.slow
def test_a_real_head_runs_two_workers_and_the_adapter_comes_back(head, tmp_path, rows):
    manager = Manager(tmp_path / "store")
    there = {"name": "ray", "address": head, "folder": str(tmp_path / "jobs"), "install": False, "nproc_per_node": "2"}
    recipe = {"model": "demo", "data": str(rows), "adapter": "lora", "max_steps": 2, "device": "cpu"}
    job = manager.submit_sync({**recipe, "provider": there})
    ended = manager.wait_sync(job.id, timeout=900)
    assert (ended.state, ended.reason) == (JobState.COMPLETED, None)
    assert manager.progress_sync(job.id).step == 2
    manager.download_sync(job.id, tmp_path / "got")
    assert isinstance(luthier.generate(tmp_path / "got", "1?", base="demo", max_new_tokens=2), str)
    manager.close()


def training_processes(place):
    """The ids of the processes that train there."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train" in words and str(place / "recipe.yaml").encode() in words and b"luthier" in words:
            yield int(path.parent.name)


def begun(manager, head, tmp_path, rows, given):
    """A job whose two workers have written a checkpoint, and its folder."""
    there = {"name": "ray", "address": head, "folder": str(tmp_path / "jobs"), "install": False, "workers": 2,
             "cpus": 1, **given}  # fmt: skip
    recipe = {"model": "demo", "data": str(rows), "adapter": "lora", "max_steps": 200, "save_steps": 1, "device": "cpu"}
    job = manager.submit_sync({**recipe, "provider": there})
    place, until = tmp_path / "jobs" / job.remote_id, time.monotonic() + 300
    while not list(place.glob("run/checkpoints/*")):
        assert time.monotonic() < until and not manager.status_sync(job.id).is_final
        time.sleep(1)
    assert json.loads((place / "run" / "run.json").read_text())["world_size"] == 2
    return job, place


@pytest.mark.slow
def test_workers_of_ray_train_go_on_after_one_was_killed_and_the_adapter_comes_back(head, tmp_path, rows):
    manager = Manager(tmp_path / "store")
    job, place = begun(manager, head, tmp_path, rows, {"min_workers": 1, "max_restarts": 2})
    os.kill(min(training_processes(place)), signal.SIGKILL)
    ended = manager.wait_sync(job.id, timeout=900)
    assert (ended.state, ended.reason) == (JobState.COMPLETED, None)
    assert (manager.progress_sync(job.id).step, (place / "starts").read_text()) == (200, "2")
    manager.download_sync(job.id, tmp_path / "got")
    assert isinstance(luthier.generate(tmp_path / "got", "1?", base="demo", max_new_tokens=2), str)
    manager.close()


@pytest.mark.slow
def test_workers_of_ray_train_keep_a_checkpoint_when_their_job_is_canceled(head, tmp_path, rows):
    manager = Manager(tmp_path / "store")
    job, place = begun(manager, head, tmp_path, rows, {})
    manager.cancel_sync(job.id)
    assert manager.wait_sync(job.id, timeout=300).state == JobState.CANCELED
    record = json.loads((place / "run" / "run.json").read_text())
    assert record["state"] == "stopped" and list((place / "run" / "checkpoints").iterdir())
    assert list(training_processes(place)) == []
    manager.close()
