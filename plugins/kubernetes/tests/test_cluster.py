"""TrainJobs: what is asked for, and what the cluster's answers say."""

import asyncio
import base64
import json
import random

import luthier
import pytest
import yaml
from luthier import JobState, ProviderError
from luthier.testing import Fault, Reply, expect_error
from train_job_schema import TRAIN_JOB, find_faults


def submitted(manager, server, rows, given=None, **more):
    there = {"name": "kubernetes", "server": server.url, "token": "env:CLUSTER_TOKEN", "namespace": "team"}
    return manager.submit_sync({"model": "demo", "data": str(rows), "provider": {**there, **(given or {})}, **more})


def test_a_job_asks_for_what_was_set_and_names_its_plugins_by_version(manager, fake, server, rows):
    given = {"claim": "training", "nodes": 2, "nproc_per_node": 4, "gpus": 4, "cpus": "16", "memory": "64Gi",
             "time_limit": 3600, "image": "registry.example/luthier:1", "runtime": "mine", "runtime_kind": "TrainingRuntime"}  # fmt: skip
    job = submitted(manager, server, rows, given, adapter="slao")
    made = fake.objects[job.remote_id]
    assert job.remote_id == f"luthier-{job.id}" and made["metadata"]["labels"] == {"luthier-job": job.id}
    spec, trainer = made["spec"], made["spec"]["trainer"]
    assert spec["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "mine"}
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 4, given["image"])
    wanted = {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": 4}
    assert trainer["resourcesPerNode"] == {"requests": wanted, "limits": wanted}
    assert spec["activeDeadlineSeconds"] == 3600 and "'luthier[local]==" in trainer["command"][2]
    assert f"luthier-slao=={luthier.__version__}" in trainer["command"][2]
    pod = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert pod["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "training"}
    recipe = yaml.safe_load(fake.parcel(job.remote_id)["recipe.yaml"])
    assert recipe["output_dir"] == f"/luthier/{job.remote_id}/run" and str(rows) not in json.dumps(recipe)


def test_what_was_not_set_is_not_asked_for(manager, fake, server, rows):
    job = submitted(manager, server, rows, {"install": False})
    spec = fake.objects[job.remote_id]["spec"]
    assert set(spec) == {"runtimeRef", "trainer"} and set(spec["trainer"]) == {"command", "env"}
    assert "pip" not in spec["trainer"]["command"][2]


def test_a_parcel_that_is_too_large_sends_nothing(manager, fake, server, tmp_path):
    rows = tmp_path / "noise.jsonl"
    noise = [base64.b64encode(random.Random(i).randbytes(60_000)).decode() for i in range(12)]
    rows.write_text("".join(json.dumps({"prompt": text, "completion": "b"}) + "\n" for text in noise))
    with expect_error("provider-unsupported", "data.train", "700000"):
        submitted(manager, server, rows)
    assert server.requests == []


def test_without_a_claim_the_user_is_told_where_results_must_lie(manager, server, rows):
    told = []
    provider = {"name": "kubernetes", "server": server.url, "token": "env:CLUSTER_TOKEN", "namespace": "team"}
    manager.submit_sync({"model": "demo", "data": str(rows)}, provider=provider, listener=told.append)
    assert [f.where for f in told[0].findings] == ["provider.claim"]


def test_why_a_run_failed_is_told_by_its_own_output(manager, fake, server, rows):
    job = submitted(manager, server, rows)
    fake.set_state(job.remote_id, "Failed")
    assert manager.status_sync(job.id).reason == "JobsFailed: jobset ended"
    other = submitted(manager, server, rows)
    fake.output.append((9, 'luthier-told: {"at": 1, "code": 3, "reason": "the disk is full", "results": {}}'))
    fake.set_state(other.remote_id, "Failed")
    assert manager.status_sync(other.id).reason == "the disk is full"


@pytest.mark.parametrize(("status", "message"), [(404, "pods x not found"), (403, "pods/log is forbidden"),
                                                 (500, "dial tcp: no route to host")])  # fmt: skip
def test_a_job_whose_output_is_gone_has_failed_all_the_same(manager, fake, server, rows, status, message):
    reply = Reply(status=status, body={"message": message, "code": status})
    server.faults = [Fault(kind="answer", method="GET", path="/log$", reply=reply, times=99)]
    for look in (manager.status_sync, manager.wait_sync):
        job = submitted(manager, server, rows)
        fake.set_state(job.remote_id, "Failed")
        found = look(job.id)
        assert found.state == JobState.FAILED
        assert found.reason.startswith(f"JobsFailed: jobset ended; its output cannot be read: {message}")


def test_a_reading_goes_on_where_one_ended(manager, fake, server, rows):
    job = submitted(manager, server, rows)
    assert [e.metrics["step"] for e in manager.events_sync(job.id) if "step" in e.metrics] == [1, 2, 3, 4]
    fake.output.append((7, fake.told_step(5)))
    events = manager.events_sync(job.id)
    assert events[-1].metrics == {"step": 5.0, "loss": 0.8}
    assert [r.first("sinceTime") for r in server.requests if r.path.endswith("/log")][:2] == [
        None,
        "2026-11-28T12:00:06Z",
    ]
    assert (manager.progress_sync(job.id).total_steps, manager.progress_sync(job.id).step) == (4, 5)


def test_a_canceled_job_is_suspended_once_and_ends_when_its_pods_have(manager, fake, server, rows):
    job = submitted(manager, server, rows)
    fake.set_state(job.remote_id, "Running")
    manager.cancel_sync(job.id)
    made = fake.objects[job.remote_id]
    assert made["spec"]["suspend"] is True and made["metadata"]["annotations"] == {"luthier-canceled": "true"}
    assert manager.status_sync(job.id).state == JobState.RUNNING  # its pods write their checkpoint
    fake.set_state(job.remote_id, "Canceled")
    assert manager.wait_sync(job.id).state == JobState.CANCELED


@pytest.mark.parametrize(("reply", "kind", "told"), [
    (Reply(status=403, body={"message": 'forbidden: exceeded quota: "gpus"', "code": 403}), "quota", "exceeded"),
    (Reply(status=404, body={"message": "the server could not find it", "code": 404}), "not_found", "Kubeflow"),
    (Reply(status=400, body={"message": 'unknown field "spec.runtimePatches"', "code": 400}), "invalid", "runtimePatches"),
])  # fmt: skip
def test_what_the_cluster_refuses_is_told_by_its_kind(manager, fake, server, rows, reply, kind, told):
    server.faults = [Fault(kind="answer", method="POST", path="/trainjobs$", reply=reply, times=9)]
    with pytest.raises(ProviderError, match=told) as caught:
        submitted(manager, server, rows)
    assert caught.value.kind == kind


def test_the_check_asks_for_the_trainer_and_the_runtime(manager, server):
    part = luthier.provider("kubernetes", server=server.url, token="env:CLUSTER_TOKEN", namespace="team")
    assert asyncio.run(part.check()) == {"namespace": "team", "runtime": "torch-distributed"}
    other = luthier.provider("kubernetes", server=server.url, token="env:CLUSTER_TOKEN", runtime="none-such")
    with pytest.raises(ProviderError, match="none-such"):
        asyncio.run(other.check())


def test_the_schema_that_holds_the_fake_refuses_strange_fields():
    good = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": "a"},
            "spec": {"runtimeRef": {"name": "r"}, "trainer": {"numNodes": 2}}}  # fmt: skip
    assert list(find_faults(good, TRAIN_JOB)) == []
    for change in ({"trainer": {"num_nodes": 2}}, {"trainer": {"numNodes": "2"}}, {"trainer": {"numProcPerNode": [1]}},
                   {"runtimeRef": {}}, {"suspended": True}):  # fmt: skip
        assert list(find_faults({**good, "spec": {**good["spec"], **change}}, TRAIN_JOB))
