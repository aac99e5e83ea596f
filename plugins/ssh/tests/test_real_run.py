"""Runs on another machine: OpenSSH's client, a server on loopback, a real worker and a real adapter."""

import asyncio
import json
import sys
import time

import luthier
import pytest
from luthier import JobState, Manager, ProviderError
from luthier.testing import expect_error
from luthier_ssh import Ssh


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
    for job in made.list_sync():
        if job.remote_id is not None and not job.is_final:
            made.cancel_sync(job.id)
            made.wait_sync(job.id, timeout=60)
    made.close()


def options(there, **more):
    return {"name": "ssh", "host": "there", "config_file": there.write_config(), "python": sys.executable, **more}


def submitted(manager, there, rows, given=None, **more):
    recipe = {"data": str(rows), "adapter": "lora", "provider": options(there, **(given or {}))}
    return manager.submit_sync(recipe, **{"model": "demo", **more})


def asked(there, act, **more):
    part = luthier.provider(**options(there, **more))
    return asyncio.run(act(part))


def test_a_start_whose_answer_is_lost_makes_one_run_and_why_it_failed_is_told(manager, there, rows, tmp_path):
    there.cut = 1
    job = submitted(manager, there, rows, model=str(tmp_path / "no-model"))
    ended = manager.wait_sync(job.id, timeout=300)
    assert ended.state == JobState.FAILED and "no-model" in ended.reason
    assert [path.name for path in (there.home / "luthier-jobs").iterdir()] == [job.id]
    assert sum("worker_desk start" in line for line in there.lines) == 1


@pytest.mark.slow
def test_a_run_over_there_is_made_once_followed_and_its_adapter_loads_here(manager, there, rows, tmp_path):
    there.cut = 1  # the answer to the start is lost
    job = submitted(manager, there, rows, max_steps=2)
    assert job.remote_id == str(there.home / "luthier-jobs" / job.id)
    told = []
    ended = manager.wait_sync(job.id, listener=told.append, timeout=600)
    assert (ended.state, ended.reason) == (JobState.COMPLETED, None)
    assert [e.metrics["step"] for e in told] == [1.0, 2.0]
    assert [path.name for path in (there.home / "luthier-jobs").iterdir()] == [job.id]
    assert sum("worker_desk start" in line for line in there.lines) == 1
    recipe = (there.home / "luthier-jobs" / job.id / "recipe.yaml").read_text()
    assert str(rows) not in recipe and "data/0-rows.jsonl" in recipe
    got = manager.download_sync(job.id, tmp_path / "got")
    assert (got.kind, got.adapter_config["peft_type"]) == ("adapter", "LORA")
    assert isinstance(luthier.generate(tmp_path / "got", "1 and 1 is", base="demo", max_new_tokens=2), str)
    assert [j.remote_id for j in asked(there, lambda part: part.list(5))] == [job.remote_id]


@pytest.mark.slow
def test_a_run_over_there_is_adopted_by_another_manager_and_ends_within_a_step(manager, there, rows, tmp_path):
    job = submitted(manager, there, rows, max_steps=5_000)
    other = Manager(tmp_path / "store")
    deadline = time.monotonic() + 60
    while not other.progress_sync(job.id).step:
        assert time.monotonic() < deadline
    other.cancel_sync(job.id)
    ended = other.wait_sync(job.id, timeout=60)
    assert ended.state == JobState.CANCELED and "checkpoint is kept" in ended.reason
    other.close()


@pytest.mark.slow
def test_the_machine_is_asked_for_its_luthier_and_its_devices(there):
    found = asked(there, lambda part: part.check())
    assert found["version"] == luthier.__version__ and "cpu" in found["devices"]


WRONG = [
    ({"host": "nowhere.invalid", "config_file": None}, "network", ("resolve",)),
    ({"host": "127.0.0.1", "port": 9, "config_file": None}, "network", ("refused",)),
    ({"identity_file": "none"}, "auth", ("identity_file",)),
    ({"python": "python-that-is-not"}, "invalid", ("ssh: there",)),
    ({"python": "/bin/true"}, "protocol", ("answer",)),
]


@pytest.mark.parametrize(("given", "kind", "told"), WRONG, ids=str)
def test_what_goes_wrong_on_the_way_is_told_by_its_kind(there, given, kind, told, tmp_path):
    config = there.write_config()
    if "identity_file" in given:  # another key than the machine knows
        import asyncssh

        asyncssh.generate_private_key("ssh-ed25519").write_private_key(there.folder / "id")
        given = {}
    merged = {"host": "there", "config_file": config, "python": sys.executable, **given}
    part = luthier.provider("ssh", **merged)
    with pytest.raises(ProviderError) as caught:
        asyncio.run(part.list(1))
    assert all(fact in str(caught.value) for fact in told)
    assert caught.value.kind == kind


def test_a_machine_with_an_unknown_key_is_not_talked_to(there):
    config = there.write_config(known=False)
    part = luthier.provider("ssh", host="there", config_file=config)
    with expect_error("provider-auth", "ssh: there") as caught:
        asyncio.run(part.check())
    assert caught.value.kind == "permission" and there.lines == []


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a b", "a;b", "$(x)"])
def test_a_host_that_is_an_option_or_a_command_is_refused(host):
    with expect_error("recipe-out-of-range", "Ssh.host"):
        Ssh(host=host)


def test_a_machine_must_be_named_and_a_job_that_is_not_there_is_not_found(there):
    with expect_error("recipe-missing", "ssh.host", "provider.host"):
        asyncio.run(luthier.provider("ssh").check())
    with pytest.raises(ProviderError) as caught:
        asked(there, lambda part: part.status("/nowhere/at all; rm -rf x"))
    assert caught.value.kind == "not_found"
