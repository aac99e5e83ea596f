"""Jobs of Anyscale by its SDK: what is asked for, how states are read, and what it does not offer."""

import asyncio
import sys

import luthier
import pytest
from fake_console import RAW, FakeConsole
from luthier import JobState, LuthierError, ProviderError
from luthier.testing import Fault, Reply, expect_error
from luthier_anyscale import AnyscaleJobs


@pytest.fixture
def fake():
    return FakeConsole()


@pytest.fixture
def keys():
    return {"ANYSCALE_CLI_TOKEN": "a_key"}


@pytest.fixture
def sdk():
    return pytest.importorskip("anyscale", reason="not installed: pip install 'luthier-anyscale[jobs]'")


def submitted(manager, server, rows, given=None, **more):
    there = {"name": "anyscale-jobs", "address": server.url, **(given or {})}
    return manager.submit_sync({"model": "demo", "data": str(rows), "provider": there, **more})


@pytest.mark.usefixtures("sdk")
@pytest.mark.slow  # the SDK alone takes seconds to import
def test_a_job_asks_for_what_was_set_and_names_its_plugins_by_version(manager, fake, server, rows):
    given = {
        "compute_config": "gpus",
        "nproc_per_node": "2",
        "folder": "/mnt/user_storage",
        "max_retries": 2,
        "time_limit": 60,
    }
    job = submitted(manager, server, rows, given, adapter="slao")
    made = fake.made[job.remote_id]
    assert (made["name"], made["tags"]) == (f"luthier-{job.id}", {"luthier_job": job.id})
    config = made["config"]
    assert (config["compute_config_id"], config["max_retries"], config["timeout_s"]) == ("cpt_1", 2, 60)
    packages = [f"luthier[local]=={luthier.__version__}", f"luthier-slao=={luthier.__version__}"]
    assert config["runtime_env"]["pip"] == packages
    assert config["entrypoint"].endswith(f"sent_worker run /mnt/user_storage/{made['name']} parcel.tar.gz")
    assert '"--nproc-per-node", "2"' in (job.spec.folder / "parcel" / "launch.json").read_text()
    plain = fake.made[submitted(manager, server, rows, {"install": False}).remote_id]["config"]
    assert "pip" not in plain["runtime_env"] and plain["max_retries"] == 0
    with expect_error("provider-invalid", "anyscale-jobs", "none-such"):
        submitted(manager, server, rows, {"compute_config": "none-such"})


@pytest.mark.usefixtures("sdk")
@pytest.mark.slow
def test_each_state_of_the_sdk_is_read_as_the_sdk_means_it(manager, fake, server, rows):
    from anyscale.job import models
    from anyscale.sdk.anyscale_client.models.ha_job_states import HaJobStates

    words = {state.value for state in models.JobState if isinstance(state.value, str) and state.value.isalpha()}
    assert words == {*RAW, "UNKNOWN"}
    job = submitted(manager, server, rows)
    ended = {"SUCCESS": JobState.COMPLETED, "BROKEN": JobState.FAILED, "OUT_OF_RETRIES": JobState.FAILED,
             "TERMINATED": JobState.CANCELED}  # fmt: skip
    waiting = ("PENDING", "AWAITING_CLUSTER_START")
    part = luthier.provider("anyscale-jobs", address=server.url)
    for word in HaJobStates.allowable_values:
        fake.set_state(job.remote_id, word)
        expected = ended.get(word, JobState.PENDING if word in waiting else JobState.RUNNING)
        assert asyncio.run(part.status(job.remote_id)).state == expected, word


@pytest.mark.usefixtures("sdk")
@pytest.mark.slow
def test_why_a_job_failed_is_told_by_its_own_output(manager, fake, server, rows):
    job = submitted(manager, server, rows)
    fake.output += 'luthier-told: {"at": 1, "code": 3, "reason": "the disk is full", "results": {}}\n'
    fake.set_state(job.remote_id, "FAILED")
    assert manager.status_sync(job.id).reason == "the disk is full"
    other = submitted(manager, server, rows)
    server.faults = [Fault(kind="answer", method="GET", path="/logs/", reply=Reply(status=404, body={}), times=9)]
    fake.set_state(other.remote_id, "FAILED")
    found = manager.wait_sync(other.id)
    assert (found.state, found.reason[:26]) == (JobState.FAILED, "its output cannot be read:")


@pytest.mark.usefixtures("sdk")
@pytest.mark.slow
def test_the_check_asks_without_cost_and_a_wrong_key_is_told(manager, fake, server, monkeypatch):
    part = luthier.provider("anyscale-jobs", address=server.url)
    assert asyncio.run(part.check()) == {"address": server.url, "jobs": "none"}
    monkeypatch.setenv("ANYSCALE_CLI_TOKEN", "no token of theirs")
    with pytest.raises(ProviderError, match="credentials") as caught:
        asyncio.run(luthier.provider("anyscale-jobs", address=server.url).check())
    assert caught.value.kind == "auth"


def test_without_the_sdk_it_is_told_what_to_install(manager, server, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "anyscale", None)
    monkeypatch.setenv("ANYSCALE_CLI_TOKEN", "a_key")
    with expect_error("dependency-missing", "anyscale-jobs", "luthier-anyscale[jobs]"):
        submitted(manager, server, rows)
    assert server.requests == []


@pytest.mark.parametrize(
    "given", [{"folder": "here"}, {"folder": "/a/../b"}, {"api_key": "literal"}, {"max_retries": -1}], ids=str
)
def test_options_that_anyscale_would_misread_are_refused(given):
    with pytest.raises(LuthierError):
        AnyscaleJobs(**given)
