"""A job is made once: whatever is lost, whoever dies, however many try."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from luthier import JobState, LuthierError, ProviderError
from luthier.errors import CODES
from luthier.plugins.providing.job_state import Stage

LOST = ("lost", "server", "protocol", "exists")


@pytest.mark.parametrize("kind", LOST)
def test_a_create_that_was_accepted_and_whose_answer_was_lost_gives_one_job(submitted, service, kind):
    service.faults = [ProviderError(kind, "no answer")]
    job = submitted()
    assert (job.stage, job.remote_id) == (Stage.CREATED, "r1")
    assert service.log == ["submit", "find"]
    assert len(service.jobs()) == 1


def test_a_job_that_its_service_lists_late_is_waited_for(submitted, service, clock):
    service.faults, service.hidden = [ProviderError("lost", "no answer")], 3
    job = submitted()
    assert job.remote_id == "r1"
    assert len(service.jobs()) == 1
    assert clock.slept[:4] == [0.0, 5.0, 15.0, 45.0]


def test_a_create_that_never_arrived_is_sent_again_once_the_service_was_seen_without_it(submitted, service):
    service.before = [ProviderError("lost", "no answer")]
    job = submitted()
    assert job.stage == Stage.CREATED
    assert service.log == ["submit", "find", "find", "find", "find", "submit"]
    assert len(service.jobs()) == 1


@pytest.mark.parametrize("kind", ["auth", "permission", "quota", "invalid", "unsupported"])
def test_a_refusal_is_sent_once_and_ends_the_job(submitted, service, manager, kind):
    service.before = [ProviderError(kind, "no")]
    with pytest.raises(ProviderError, match="no"):
        submitted()
    assert service.log == ["submit"]
    (job,) = manager.list_sync()
    assert (job.stage, job.state, job.reason) == (Stage.REFUSED, JobState.FAILED, "no")


def test_a_job_that_could_not_be_sent_is_gone_on_with_by_its_id_and_not_submitted_again(submitted, service, manager):
    service.before = [ProviderError("network", "no such host")]
    with pytest.raises(ProviderError) as caught:
        submitted()
    (job,) = manager.list_sync()
    assert f"`luthier attach {job.id}`" in caught.value.remedy
    assert caught.value.remedy.startswith(CODES["provider-unreachable"].remedy)
    assert manager.attach_sync(job.id).stage == Stage.CREATED and len(service.jobs()) == 1


def test_what_the_user_gave_wrongly_ends_the_job_that_was_not_sent(submitted, service, manager):
    service.before = [LuthierError("recipe-missing", "no machine is named", where="provider.host")]
    with pytest.raises(LuthierError) as caught:
        submitted()
    assert caught.value.code == "recipe-missing"
    (job,) = manager.list_sync()
    assert (job.stage, job.state) == (Stage.REFUSED, JobState.FAILED)


def test_a_service_that_asks_to_wait_is_waited_for(submitted, service, clock):
    service.before = [ProviderError("limited", "slow down", retry_after=7.0)]
    assert submitted().stage == Stage.CREATED
    assert 7.0 in clock.slept
    assert service.log == ["submit", "submit"]


def test_a_service_that_asks_to_wait_for_a_day_is_not_waited_for(submitted, service, manager, clock):
    service.before = [ProviderError("limited", "slow down", retry_after=86400.0)]
    with pytest.raises(ProviderError):
        submitted()
    assert clock.slept == []
    (job,) = manager.list_sync()
    assert job.stage == Stage.UPLOADED
    service.before = []
    assert manager.attach_sync(job.id).stage == Stage.CREATED


def test_several_candidates_are_told_and_nothing_is_sent(submitted, service):
    service.faults = [ProviderError("lost", "no answer")]

    async def find(job, uploads):
        service.put("r9", key=job.id)
        return [await service.status(id) for id in service.jobs()]

    service.find = find
    with pytest.raises(LuthierError, match="r1, r9") as caught:
        submitted()
    assert caught.value.code == "job-unclear"
    assert service.log == ["submit"]


def test_a_service_that_cannot_be_asked_is_not_asked_again(submitted, service):
    service.faults = [ProviderError("lost", "no answer")]

    async def find(job, uploads):
        return None

    service.find = find
    with pytest.raises(LuthierError) as caught:
        submitted()
    assert caught.value.code == "job-unclear"
    assert service.log == ["submit"]


CHILD = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import FileService, TurnedClock
from luthier import Manager
from luthier.jobs.store.job_store import JobStore

left = {arrow}
def tell(job, step):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Mortal(FileService):
    async def submit(self, job, uploads):
        status = await super().submit(job, uploads)
        if {after_create}:
            os.kill(os.getpid(), signal.SIGKILL)
        return status

base = Path({base!r})
service = Mortal(base / "service.json")
manager = Manager(clock=TurnedClock(), store=JobStore(base / "store", observer=tell))
waiting = manager.list_sync()
if waiting:
    manager._objects[waiting[0].id] = __import__("luthier.jobs.restoring", fromlist=["x"]).make_provider(service)
    job = manager.attach_sync(waiting[0].id)
else:
    job = manager.submit_sync({{"model": "demo", "data": str(base / "rows.jsonl")}}, provider=service)
print(job.stage, job.remote_id)
"""
ARROWS = ("intent", "uploaded", "creating", "created")


@pytest.mark.parametrize("arrow", [*range(1, len(ARROWS) + 1), "answer"])
def test_a_process_killed_at_any_step_leaves_one_job_after_another_went_on(tmp_path, rows, arrow):
    def child(arrow, after_create):
        script = CHILD.format(
            arrow=arrow, after_create=after_create, tests=str(Path(__file__).parent), base=str(tmp_path)
        )
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    first = child(0 if arrow == "answer" else arrow, arrow == "answer")
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = child(0, False)
    assert second.stdout.split() == ["created", "r1"], second.stderr
    assert len(json.loads((tmp_path / "service.json").read_text())) == 1


def test_two_processes_that_go_on_with_a_job_make_one(submitted, service, manager):
    service.before = [ProviderError("network", "down")]
    with pytest.raises(ProviderError):
        submitted()
    (job,) = manager.list_sync()
    service.log.clear()

    async def both():
        return await asyncio.gather(*(manager.attach(job.id) for _ in range(2)), return_exceptions=True)

    outcomes = asyncio.run(both())
    assert service.log.count("submit") == 1
    assert [getattr(o, "code", "made") for o in outcomes] in (
        ["made", "job-busy"],
        ["job-busy", "made"],
        ["made", "made"],
    )
