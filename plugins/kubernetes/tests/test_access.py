"""Whom a cluster is asked as: kubeconfigs, tokens that end, certificates, and options that are refused."""

import asyncio
import base64
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from fractions import Fraction

import luthier
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from luthier import JobState, LuthierError
from luthier.testing import Fault, Reply, VirtualClock, expect_error
from luthier_kubernetes import Kubernetes
from luthier_kubernetes.access import find_access
from luthier_kubernetes.bearer_token import EARLY
from luthier_kubernetes.quantity import read_quantity


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
    line = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=me -keyout {key} -out {pair}"
    subprocess.run(shlex.split(line), check=True, capture_output=True)
    encoded = {path: base64.b64encode(path.read_bytes()).decode() for path in (key, pair)}
    user = {"client-certificate-data": encoded[pair], "client-key-data": encoded[key]}
    config = write_config(tmp_path / "config", user, {"certificate-authority": "pair.pem"})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "room"))
    (tmp_path / "room").mkdir()
    context = find_access(Kubernetes(kubeconfig=config)).tls()
    assert context.cert_store_stats()["x509_ca"] == 1 and context.check_hostname
    assert list((tmp_path / "room").iterdir()) == []
    damaged = write_config(tmp_path / "damaged", {**user, "client-key-data": encoded[pair]})
    with expect_error("credential-missing", "kubernetes"):
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
    ({"username": "me", "password": "p"}, {}, ("username",)), ({"auth-provider": {"name": "gcp"}}, {}, ("auth-provider",)),
    ({}, {"insecure-skip-tls-verify": True}, ("insecure-skip-tls-verify",)), ({}, {"proxy-url": "http://p"}, ("proxy-url",)),
    ({"as": "admin"}, {}, ("config",)),
])  # fmt: skip
def test_what_a_kubeconfig_asks_for_and_is_not_done_is_refused(tmp_path, user, cluster, told):
    with pytest.raises(LuthierError) as caught:
        find_access(Kubernetes(kubeconfig=write_config(tmp_path / "config", user, cluster)))
    assert all(fact in str(caught.value) for fact in told)


def test_files_of_a_kubeconfig_are_read_as_one_and_a_wrong_name_is_told(tmp_path, monkeypatch):
    first = write_config(tmp_path / "a", {"token": "of-a"}, name="a")
    monkeypatch.setenv("KUBECONFIG", f"{first}:{write_config(tmp_path / 'b', {'token': 'of-b'}, name='b')}")
    assert find_access(Kubernetes()).namespace == "team"
    assert find_access(Kubernetes(context="b", namespace="other")).namespace == "other"
    with expect_error("credential-missing", "b", "'c'"):
        find_access(Kubernetes(context="c"))
    monkeypatch.setenv("KUBECONFIG", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with expect_error("credential-missing", "kubernetes.kubeconfig"):
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


def exec_config(folder, server, ends="None"):
    """A kubeconfig whose command gives another token each time it is run, and notes each of its runs."""
    mark = folder / "ran"
    code = (
        f"import json; mark = open({str(mark)!r}, 'a+'); mark.write('x'); mark.seek(0); count = len(mark.read())\n"
        f"ends = {ends}; status = {{'token': f'token-{{count}}', **({{'expirationTimestamp': ends}} if ends else {{}})}}\n"
        "print(json.dumps({'kind': 'ExecCredential', 'status': status}))"
    )
    command = {"command": sys.executable, "args": ["-S", "-c", code]}
    return mark, write_config(folder / "config", {"exec": command}, {"server": server})


def submitted(manager, config, rows):
    there = {"name": "kubernetes", "kubeconfig": config, "run_exec": True}
    return manager.submit_sync({"model": "demo", "data": str(rows), "provider": there})


@pytest.mark.parametrize("path", ["/trainjobs/[^/]+$", "/pods$", "/log$"])
def test_a_token_that_ends_during_a_long_wait_is_asked_for_again(manager, fake, server, rows, tmp_path, path):
    mark, config = exec_config(tmp_path, server.url)
    job = submitted(manager, config, rows)
    fake.set_state(job.remote_id, "Running")
    unknown = Reply(status=401, body={"kind": "Status", "message": "Unauthorized", "code": 401})
    runs = len(mark.read_text())
    server.faults = [Fault(kind="answer", path=path, reply=unknown)]
    fake.set_state(job.remote_id, "Complete")
    assert manager.wait_sync(job.id).state == JobState.COMPLETED
    assert len(mark.read_text()) == runs + 2  # one by this manager's new provider, one after the refusal
    assert server.requests[-1].headers["authorization"] == f"Bearer token-{runs + 2}"


def test_a_job_is_made_once_although_the_token_had_ended(manager, fake, server, rows, tmp_path):
    mark, config = exec_config(tmp_path, server.url)
    unknown = Reply(status=401, body={"message": "Unauthorized", "code": 401})
    server.faults = [Fault(kind="answer", method="POST", reply=unknown)]
    job = submitted(manager, config, rows)
    assert list(fake.objects) == [job.remote_id] and server.count("POST", "/trainjobs$") == 2


def test_a_token_that_is_refused_for_good_is_asked_for_once_more_and_no_oftener(server, tmp_path):
    mark, config = exec_config(tmp_path, server.url)
    server.faults = [Fault(kind="answer", reply=Reply(status=401, body={"message": "Unauthorized"}), times=99)]
    part = luthier.provider("kubernetes", kubeconfig=config, run_exec=True)
    with pytest.raises(LuthierError) as caught:
        asyncio.run(part.check())
    assert (caught.value.kind, mark.read_text(), len(server.requests)) == ("auth", "xx", 2)


def test_a_key_that_stays_the_same_is_not_tried_twice(server, monkeypatch):
    monkeypatch.setenv("CLUSTER_TOKEN", "t0ken-of-the-cluster")
    server.faults = [Fault(kind="answer", reply=Reply(status=401, body={"message": "Unauthorized"}), times=99)]
    part = luthier.provider("kubernetes", server=server.url, token="env:CLUSTER_TOKEN")
    with pytest.raises(LuthierError) as caught:
        asyncio.run(part.check())
    assert (caught.value.kind, len(server.requests)) == ("auth", 1)


def test_a_token_is_asked_for_again_shortly_before_the_end_that_it_says(tmp_path):
    clock = VirtualClock()
    ends = clock.now() + 900
    stamp = datetime.fromtimestamp(ends, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    mark, config = exec_config(tmp_path, "https://cluster.example", repr(stamp))
    access = find_access(Kubernetes(kubeconfig=config, run_exec=True), clock.now)
    for at, runs in ((0, 1), (900 - EARLY - 1, 1), (900 - EARLY, 2)):
        clock.time = ends - 900 + at
        assert access.headers()["authorization"].reveal() == f"Bearer token-{runs}"
        assert len(mark.read_text()) == runs


@pytest.mark.parametrize(
    "written", ["", "not json", "[]", '{"status": []}', '{"status": {}}', '{"status": {"token": ""}}']
)
def test_a_command_without_a_token_is_told_with_its_file(tmp_path, written):
    command = {"command": sys.executable, "args": ["-S", "-c", f"print({written!r})"]}
    config = write_config(tmp_path / "config", {"exec": command})
    with pytest.raises(LuthierError) as caught:
        find_access(Kubernetes(kubeconfig=config, run_exec=True)).headers()
    assert caught.value.code == "credential-missing"


@pytest.mark.parametrize(
    "text", [None, "", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_an_authority_that_cannot_be_read_is_refused_before_anything_is_packed(manager, server, tmp_path, text):
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    there = {"name": "kubernetes", "server": server.url, "certificate_authority": str(path)}
    with pytest.raises(LuthierError) as caught:
        manager.submit_sync({"model": "demo", "data": str(tmp_path / "no-rows.jsonl"), "provider": there})
    error = caught.value
    assert (error.code, error.where) == ("credential-missing", "kubernetes.certificate_authority")
    assert error.found == str(path) and "PEM" in error.remedy and server.requests == []


def test_a_file_that_a_kubeconfig_names_and_is_not_there_is_told(tmp_path):
    config = write_config(tmp_path / "config", {"token": "t"}, {"certificate-authority": "ca.pem"})
    with pytest.raises(LuthierError) as caught:
        find_access(Kubernetes(kubeconfig=config)).tls()
    assert (caught.value.where, caught.value.found) == (config, str(tmp_path / "ca.pem"))


REFERENCE = {"": 1, "m": Fraction(1, 1000), "k": 1000, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18,
             "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60, "u": Fraction(1, 10**6),
             "n": Fraction(1, 10**9), "e3": 1000, "E-2": Fraction(1, 100), "e+1": 10}  # fmt: skip


@given(st.integers(0, 9999), st.integers(0, 3), st.sampled_from(sorted(REFERENCE)))
def test_a_quantity_is_the_number_that_kubernetes_reads(digits, places, suffix):
    number = Fraction(digits, 10**places)
    text = f"{digits // 10**places}.{digits % 10**places:0{places}}" if places else str(digits)
    assert read_quantity(f"{text}{suffix}") == number * REFERENCE[suffix]
    assert read_quantity(f"+{text}{suffix}") == read_quantity(f"{text}{suffix}")


@pytest.mark.parametrize("text", ["", "Gi", "8K", "8 Gi", "8GB", "8gi", "-1", "1e", "0x8", "1,5", "8Gi ", "1.2.3", "٨"])
def test_what_kubernetes_reads_as_no_quantity_is_none(text):
    assert read_quantity(text) is None


@pytest.mark.parametrize(("asked", "wanted"), [
    ({"cpus": 8}, {"cpu": "8"}), ({"cpus": 0.5}, {"cpu": "0.5"}), ({"cpus": "500m"}, {"cpu": "500m"}),
    ({"memory": "8Gi"}, {"memory": "8Gi"}), ({"memory": 8 * 2**30}, {"memory": str(8 * 2**30)}),
])  # fmt: skip
def test_a_quantity_may_be_given_as_a_number(manager, fake, server, rows, asked, wanted):
    there = {"name": "kubernetes", "server": server.url, "token": "env:CLUSTER_TOKEN", "namespace": "team", **asked}
    job = manager.submit_sync({"model": "demo", "data": str(rows), "provider": there})
    made = fake.objects[job.remote_id]["spec"]["trainer"]["resourcesPerNode"]
    assert made == {"requests": wanted, "limits": wanted}


@pytest.mark.parametrize(("asked", "remedy"), [
    ({"cpus": "eight"}, "500m"), ({"cpus": 0}, "500m"), ({"cpus": -1}, "500m"), ({"cpus": "1u"}, "500m"),
    ({"memory": "8GB"}, "32Gi"), ({"memory": 64}, "32Gi"), ({"memory": "500m"}, "32Gi"), ({"memory": "64"}, "32Gi"),
])  # fmt: skip
def test_a_quantity_that_is_none_is_refused_with_its_place_and_a_remedy(manager, server, rows, asked, remedy):
    there = {"name": "kubernetes", "server": server.url, "token": "env:CLUSTER_TOKEN", **asked}
    with pytest.raises(LuthierError) as caught:
        manager.submit_sync({"model": "demo", "data": str(rows), "provider": there})
    ((name, value),) = asked.items()
    assert (caught.value.code, caught.value.found) == ("recipe-out-of-range", value)
    assert caught.value.where.endswith(f".{name}") and remedy in caught.value.remedy and server.requests == []


@pytest.mark.parametrize("given", [
    {"namespace": "a/b"}, {"runtime": "../x"}, {"claim": "A b"}, {"cpus": "many"}, {"memory": "1 GB"}, {"folder": "here"}, {"work_folder": "./here"},
    {"folder": "/a/../b"}, {"runtime_kind": "Pod"}, {"server": "https://x", "kubeconfig": "y"}, {"token": "env:T"},
    {"server": "https://x", "token": "literal"},
], ids=str)  # fmt: skip
def test_options_that_the_cluster_would_misread_are_refused(given):
    with pytest.raises(LuthierError):
        Kubernetes(**given)
