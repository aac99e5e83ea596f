"""TrainJobs: what is asked for, whom the cluster is asked as, and what its answers say."""

import asyncio
import base64
import json
import random
import re
import subprocess
import sys

import luthier
import pytest
import yaml
from luthier import JobState, LuthierError, Manager, ProviderError
from luthier.testing import Fault, Reply, VirtualClock
from luthier_kubernetes import Kubernetes
from luthier_kubernetes.access import find_access
from train_job_schema import TRAIN_JOB, find_faults


@pytest.fixture
def manager(tmp_path, monkeypatch):
    monkeypatch.setenv("CLUSTER_TOKEN", "t0ken-of-the-cluster")
    made = Manager(tmp_path / "store", clock=VirtualClock())
    yield made
    made.close()


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
    with pytest.raises(LuthierError, match="of which 700000 can be sent"):
        submitted(manager, server, rows)
    assert server.requests == []


def test_without_a_claim_the_user_is_told_where_results_must_lie(manager, server, rows):
    told = []
    provider = {"name": "kubernetes", "server": server.url, "token": "env:CLUSTER_TOKEN", "namespace": "team"}
    manager.submit_sync({"model": "demo", "data": str(rows)}, provider=provider, told=told.append)
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
    (Reply(status=403, body={"message": 'forbidden: exceeded quota: "gpus"', "code": 403}), "quota", "exceeded quota"),
    (Reply(status=404, body={"message": "the server could not find it", "code": 404}), "not_found", "Install Kubeflow"),
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


def write_config(path, user, cluster=None, name="here"):
    cluster = {"server": "https://cluster.example:6443", **(cluster or {})}
    path.write_text(yaml.safe_dump({
        "current-context": name,
        "clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": "u", "user": user}],
        "contexts": [{"name": name, "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
    }))  # fmt: skip
    return str(path)


def test_a_token_is_read_of_the_file_or_of_another_that_it_names(tmp_path):
    (tmp_path / "token").write_text("second\n")
    for user, token in (({"token": "first-token"}, "first-token"), ({"tokenFile": "token"}, "second")):
        access = find_access(Kubernetes(kubeconfig=write_config(tmp_path / "config", user)))
        assert (access.server, access.namespace) == ("https://cluster.example:6443", "team")
        header = access.headers()["authorization"]
        assert header.reveal() == f"Bearer {token}" and token not in repr(access) + str(header)


def test_a_certificate_of_the_user_and_the_authority_are_taken_and_left_nowhere(tmp_path, monkeypatch):
    key, pair = tmp_path / "key.pem", tmp_path / "pair.pem"
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    subprocess.run([*words, "-subj", "/CN=me", "-keyout", key, "-out", pair], check=True, capture_output=True)
    encoded = {path: base64.b64encode(path.read_bytes()).decode() for path in (key, pair)}
    user = {"client-certificate-data": encoded[pair], "client-key-data": encoded[key]}
    config = write_config(tmp_path / "config", user, {"certificate-authority": "pair.pem"})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "room"))
    (tmp_path / "room").mkdir()
    context = find_access(Kubernetes(kubeconfig=config)).tls()
    assert context.cert_store_stats()["x509_ca"] == 1 and context.check_hostname
    assert list((tmp_path / "room").iterdir()) == []
    damaged = write_config(tmp_path / "damaged", {**user, "client-key-data": encoded[pair]})
    with pytest.raises(LuthierError, match="certificate cannot be read"):
        find_access(Kubernetes(kubeconfig=damaged)).tls()


def test_a_command_is_run_only_where_that_was_asked_for(tmp_path):
    mark = tmp_path / "ran"
    answer = {"status": {"token": "t-of-the-command"}}
    code = f"import json, os; open({str(mark)!r}, 'a').write(os.environ['GIVEN']); print(json.dumps({answer!r}))"
    command = {"command": sys.executable, "args": ["-S", "-c", code], "env": [{"name": "GIVEN", "value": "x"}]}
    config = write_config(tmp_path / "config", {"exec": command})
    with pytest.raises(LuthierError, match="run_exec"):
        find_access(Kubernetes(kubeconfig=config))
    assert not mark.exists()
    access = find_access(Kubernetes(kubeconfig=config, run_exec=True))
    assert not mark.exists()
    assert {access.headers()["authorization"].reveal() for _ in range(2)} == {"Bearer t-of-the-command"}
    assert mark.read_text() == "x"


@pytest.mark.parametrize(("user", "cluster", "told"), [
    ({"username": "me", "password": "p"}, {}, "username"), ({"auth-provider": {"name": "gcp"}}, {}, "auth-provider"),
    ({}, {"insecure-skip-tls-verify": True}, "insecure-skip-tls-verify"), ({}, {"proxy-url": "http://p"}, "proxy-url"),
    ({"as": "admin"}, {}, "as is not supported"),
])  # fmt: skip
def test_what_a_kubeconfig_asks_for_and_is_not_done_is_refused(tmp_path, user, cluster, told):
    with pytest.raises(LuthierError, match=told):
        find_access(Kubernetes(kubeconfig=write_config(tmp_path / "config", user, cluster)))


def test_files_of_a_kubeconfig_are_read_as_one_and_a_wrong_name_is_told(tmp_path, monkeypatch):
    first = write_config(tmp_path / "a", {"token": "of-a"}, name="a")
    monkeypatch.setenv("KUBECONFIG", f"{first}:{write_config(tmp_path / 'b', {'token': 'of-b'}, name='b')}")
    assert find_access(Kubernetes()).namespace == "team"
    assert find_access(Kubernetes(context="b", namespace="other")).namespace == "other"
    with pytest.raises(LuthierError, match=re.escape("no context 'c'; known: a, b")):
        find_access(Kubernetes(context="c"))
    monkeypatch.setenv("KUBECONFIG", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(LuthierError, match="no kubeconfig is here"):
        find_access(Kubernetes())


def test_a_pod_of_the_cluster_uses_its_own_account(tmp_path, monkeypatch):
    for name, text in (("token", "pods-own"), ("namespace", "lab\n"), ("ca.crt", "")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("luthier_kubernetes.access.ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    access = find_access(Kubernetes())
    assert (access.server, access.namespace) == ("https://10.0.0.1:443", "lab")
    assert access.headers()["authorization"].reveal() == "Bearer pods-own"


@pytest.mark.parametrize("given", [
    {"namespace": "a/b"}, {"runtime": "../x"}, {"claim": "A b"}, {"cpus": "many"}, {"memory": "1 GB"}, {"folder": "here"}, {"work_folder": "./here"},
    {"folder": "/a/../b"}, {"runtime_kind": "Pod"}, {"server": "https://x", "kubeconfig": "y"}, {"token": "env:T"},
    {"server": "https://x", "token": "literal"},
], ids=str)  # fmt: skip
def test_options_that_the_cluster_would_misread_are_refused(given):
    with pytest.raises(LuthierError):
        Kubernetes(**given)


def test_the_schema_that_holds_the_fake_refuses_strange_fields():
    good = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": "a"},
            "spec": {"runtimeRef": {"name": "r"}, "trainer": {"numNodes": 2}}}  # fmt: skip
    assert list(find_faults(good, TRAIN_JOB)) == []
    for change in ({"trainer": {"num_nodes": 2}}, {"trainer": {"numNodes": "2"}}, {"trainer": {"numProcPerNode": [1]}},
                   {"runtimeRef": {}}, {"suspended": True}):  # fmt: skip
        assert list(find_faults({**good, "spec": {**good["spec"], **change}}, TRAIN_JOB))
