"""Managed jobs: what is asked for, the price that is shown first, and how a launch is settled whose answer was lost."""

import asyncio

import luthier
import pytest
from luthier import CostEstimate, JobState, LuthierError, ProviderError
from luthier.testing import Fault, Reply, expect_error
from luthier_skypilot import Skypilot


def submitted(manager, server, rows, given=None, *, max_cost=None, listener=None, **more):
    there = {"name": "skypilot", "address": server.url, "token": "env:SKYPILOT_TOKEN", "bucket": "s3://results"}
    recipe = {"model": "demo", "data": str(rows), "provider": {**there, **(given or {})}, **more}
    return manager.submit_sync(recipe, max_cost=max_cost, listener=listener)


def test_a_job_asks_for_what_was_set_and_names_its_plugins_by_version(manager, fake, server, rows):
    given = {"infra": "aws/us-east-1", "accelerators": "H100:1", "cpus": "8+", "memory": "64+", "use_spot": True,
             "image": "docker:registry.example/luthier:1", "nproc_per_node": "2", "time_limit": 60, "folder": "/out"}  # fmt: skip
    job = submitted(manager, server, rows, given, adapter="slao")
    task = fake.tasks[job.remote_id]
    name = f"luthier-{job.id}"
    assert (task["name"], fake.queue[job.remote_id]["job_name"]) == (name, name)
    assert task["resources"] == {"infra": "aws/us-east-1", "accelerators": "H100:1", "cpus": "8+", "memory": "64+",
                                 "use_spot": True, "image_id": given["image"]}  # fmt: skip
    assert task["file_mounts"] == {"/out": {"source": "s3://results", "mode": "MOUNT"}}
    assert f"'luthier[local]=={luthier.__version__}' luthier-slao=={luthier.__version__}" in task["setup"]
    assert task["run"].startswith("timeout --signal=TERM --kill-after=600 60 python")
    assert task["run"].endswith(f"sent_worker run /out/{name}")
    assert '"--nproc-per-node", "2"' in (job.spec.folder / "parcel" / "launch.json").read_text()


def test_what_was_not_set_is_not_asked_for(manager, fake, server, rows):
    told = []
    job = submitted(manager, server, rows, {"install": False, "bucket": None}, listener=told.append)
    task = fake.tasks[job.remote_id]
    assert set(task) == {"name", "resources", "envs", "run"} and task["resources"] == {}
    assert [f.where for f in told[0].findings] == ["provider.bucket"]


def test_the_price_of_the_chosen_machine_is_shown_before_anything_else_is_sent(manager, fake, server, rows):
    told = []
    submitted(manager, server, rows, {"time_limit": 7200}, listener=lambda p: told.append((p.cost, len(fake.queue))))
    ((cost, queued),) = told
    assert (cost.amount, cost.currency, cost.tokens, queued) == (5.86, "USD", None, 0)
    asked = [r.json["dag"] for r in server.requests if r.path == "/optimize"]
    assert len(asked) == 1 and "PARCEL" not in asked[0]  # no rows
    with expect_error("cost-above", "max_cost", "5.86"):
        submitted(manager, server, rows, {"time_limit": 7200}, max_cost=5)
    with expect_error("cost-above", "max_cost", "2.93", "provider.time_limit"):
        submitted(manager, server, rows, max_cost=5)
    assert len(fake.queue) == 1


@pytest.mark.parametrize(("plan", "basis"), [
    ("Estimated cost: $0.4 / hour\n", "0.4 USD an hour"), ("no plan at all", "states no price"),
])  # fmt: skip
def test_a_plan_without_a_table_is_read_as_far_as_it_goes(manager, fake, server, rows, plan, basis):
    fake.plan = plan
    told = []
    submitted(manager, server, rows, listener=lambda prepared: told.append(prepared.cost))
    assert isinstance(told[0], CostEstimate) and told[0].amount is None and basis in told[0].basis


@pytest.mark.parametrize(("kind", "expected"), [
    ("NoCloudAccessError", "permission"), ("ResourcesUnavailableError", "unsupported"), ("ValueError", "invalid"),
])  # fmt: skip
def test_a_job_that_no_cloud_takes_is_refused_before_it_is_launched(manager, fake, server, rows, kind, expected):
    fake.refusal = {"object": "gASV", "type": kind, "message": "\x1b[31mrun: sky check\x1b[0m"}
    with pytest.raises(ProviderError) as caught:
        submitted(manager, server, rows)
    assert (caught.value.kind, caught.value.provider_code) == (expected, kind)
    assert "\x1b" not in str(caught.value)
    assert server.count("POST", "/jobs/launch") == 0


def test_a_launch_that_is_still_under_way_is_waited_for_and_not_sent_again(manager, fake, server, rows):
    """The answer was lost, and the server has not put the job into its queue yet."""
    server.faults = [Fault(kind="lost", method="POST", path="/jobs/launch$")]
    show, hidden = fake.answer, {}

    def answer_late(request):
        if request.path == "/jobs/queue/v2" and not hidden and fake.queue:
            hidden.update(fake.queue)
            fake.queue.clear()
            (launch,) = [item for item in fake.requests.values() if item["name"] == "sky.jobs.launch"]
            launch |= {"status": "RUNNING", "request_body": f'{{"name": "{hidden["1"]["job_name"]}"}}'}
        if request.path == "/api/get" and fake.requests[request.first("request_id")]["status"] == "RUNNING":
            fake.queue.update(hidden)
        return show(request)

    server.answer = answer_late
    job = submitted(manager, server, rows)
    assert (job.remote_id, server.count("POST", "/jobs/launch")) == ("1", 1)


def test_why_a_job_failed_is_told_by_its_own_output(manager, fake, server, rows):
    job = submitted(manager, server, rows)
    fake.set_state(job.remote_id, "FAILED_SETUP")
    assert manager.status_sync(job.id).reason == "the command failed"
    other = submitted(manager, server, rows)
    fake.output += '(x, pid=7) luthier-told: {"at": 1, "code": 3, "reason": "the disk is full", "results": {}}\n'
    fake.set_state(other.remote_id, "FAILED")
    assert manager.status_sync(other.id).reason == "the disk is full"
    third = submitted(manager, server, rows)
    server.faults = [Fault(kind="answer", path="/jobs/logs", reply=Reply(status=404, body={"detail": "gone"}), times=9)]
    fake.set_state(third.remote_id, "FAILED")
    found = manager.wait_sync(third.id)
    assert found.state == JobState.FAILED and "its output cannot be read: gone" in found.reason


def test_a_canceled_job_runs_until_its_machine_is_given_back(manager, fake, server, rows):
    job = submitted(manager, server, rows)
    manager.cancel_sync(job.id)
    status = manager.status_sync(job.id)
    assert (status.state, status.phase, fake.queue["1"]["status"]) == (JobState.RUNNING, "cancelling", "CANCELLING")
    fake.set_state(job.remote_id, "CANCELLED")
    assert manager.wait_sync(job.id).state == JobState.CANCELED


def test_the_check_tells_the_version_and_that_a_login_is_missing(manager, server):
    part = luthier.provider("skypilot", address=server.url, token="env:SKYPILOT_TOKEN")
    assert asyncio.run(part.check()) == {"skypilot": "0.14.1", "api": "62"}
    reply = Reply(body={"status": "needs_auth"})
    server.faults = [Fault(kind="answer", path="/api/health", reply=reply)]
    other = luthier.provider("skypilot", address=server.url, token="env:SKYPILOT_TOKEN")
    with pytest.raises(ProviderError, match="needs_auth"):
        asyncio.run(other.check())


@pytest.mark.parametrize("given", [{"folder": "here"}, {"folder": "/a/../b"}, {"token": "literal"}, {"bucket": "results"},
                                   {"time_limit": 0}], ids=str)  # fmt: skip
def test_options_that_the_server_would_misread_are_refused(given):
    with pytest.raises(LuthierError):
        Skypilot(**given)
