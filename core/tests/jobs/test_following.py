"""A job is followed to its end, through failures, unknown states and standstill; its events come once each."""

import asyncio
import random

import pytest
from luthier import EventPage, JobEvent, JobState, LuthierError, ProviderError
from luthier.jobs.following import Polling
from luthier.testing import expect_error


def test_polling_backs_off_while_nothing_changes_and_begins_again_when_something_does():
    polling = Polling(shortest=5.0, longest=60.0, generator=random.Random(0))
    waits = [polling.next_wait(changed=False) for _ in range(12)]
    assert 4.0 <= waits[0] <= 6.0
    assert 48.0 <= waits[-1] <= 72.0
    assert len(set(waits[-4:])) == 4  # jitter
    assert polling.next_wait(changed=True) <= 6.0


def script_of(service, *states):
    """Let the service report these states one after the other, and stay at the last; an exception is raised."""
    left, status = list(states), service.status

    async def told(remote_id):
        state = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(state, Exception):
            raise state
        service.put(remote_id, state=state)
        return await status(remote_id)

    service.status = told


def test_a_job_is_waited_for_and_its_events_are_told_once(submitted, service, manager):
    job, told = submitted(), []
    script_of(service, "running", "running", "completed")
    ended = manager.wait_sync(job.id, listener=told.append)
    assert ended.state == JobState.COMPLETED
    assert [e.id for e in told] == [str(i) for i in range(7)]
    assert [e.id for e in manager.events_sync(job.id)] == [str(i) for i in range(7)]
    assert manager.progress_sync(job.id).step == 6


def test_an_unknown_state_is_unknown_and_polling_goes_on(submitted, service, manager):
    job, told = submitted(), []
    script_of(service, "preheating", "preheating", "cooling", "completed")
    assert manager.wait_sync(job.id, listener=told.append).state == JobState.COMPLETED
    assert [e.message.split("'")[1] for e in told if e.kind == "warning"] == ["preheating", "cooling"]


def test_passing_failures_are_borne_and_retry_after_is_kept(submitted, service, manager, clock):
    job = submitted()
    script_of(service, "running", ProviderError("limited", "slow", retry_after=99.0), ProviderError("server", "oh"),
              ProviderError("lost", "cut"), "completed")  # fmt: skip
    assert manager.wait_sync(job.id).state == JobState.COMPLETED
    assert any(wait >= 99.0 for wait in clock.slept)


@pytest.mark.parametrize("kind", ["auth", "quota", "not_found"])
def test_what_does_not_pass_is_not_asked_again(submitted, service, manager, kind):
    job = submitted()
    script_of(service, "running", ProviderError(kind, "no"), AssertionError("asked again"))
    with pytest.raises(ProviderError) as caught:
        manager.wait_sync(job.id)
    assert caught.value.kind == kind
    assert manager.store.get_job(job.id).state == JobState.RUNNING


def test_a_service_that_stays_down_is_told_in_the_end(submitted, service, manager):
    job = submitted()
    script_of(service, ProviderError("server", "down"))
    with pytest.raises(ProviderError, match="down"):
        manager.wait_sync(job.id)


@pytest.mark.parametrize(("kind", "looks"), [("permission", 3), ("server", 3), ("server", 30)])
def test_events_that_cannot_be_read_end_no_waiting_and_are_told_once(submitted, service, manager, clock, kind, looks):
    job, told = submitted(), []
    script_of(service, *["running"] * looks, "completed")

    async def events(remote_id, cursor):
        raise ProviderError(kind, "its log is gone", retry_after=99.0)

    service.events = events
    assert manager.wait_sync(job.id, listener=told.append).state == JobState.COMPLETED
    assert len([e for e in told if "the events cannot be read" in e.message and "its log is gone" in e.message]) == 1
    assert all(wait >= 99.0 for wait in clock.slept)


def test_events_whose_reading_fails_in_passing_are_not_told_of(submitted, service, manager):
    job, told, events = submitted(), [], service.events
    faults = [ProviderError("lost", "cut"), ProviderError("limited", "slow")]
    script_of(service, "running", "running", "running", "completed")

    async def broken(remote_id, cursor):
        if faults:
            raise faults.pop()
        return await events(remote_id, cursor)

    service.events = broken
    assert manager.wait_sync(job.id, listener=told.append).state == JobState.COMPLETED
    assert [e.id for e in told] == [str(i) for i in range(7)]


def test_a_timeout_leaves_the_job_running(submitted, service, manager, clock):
    job = submitted()
    script_of(service, "running")
    with pytest.raises(LuthierError) as caught:
        manager.wait_sync(job.id, timeout=100.0)
    assert (caught.value.code, caught.value.exit_status) == ("job-timeout", 75)
    assert "attach" in caught.value.remedy and job.id in str(caught.value)


def test_a_job_that_stands_still_is_told_of_once(submitted, service, manager):
    job, told = submitted(), []
    script_of(service, *["running"] * 200, "completed")
    manager.wait_sync(job.id, listener=told.append)
    assert len([e for e in told if "nothing has changed" in e.message]) == 1


def test_events_go_on_from_the_cursor_in_another_manager_and_repeats_are_dropped(submitted, service, manager):
    job = submitted()
    pages = [["b", "a"], ["a", "c"], []]

    async def events(remote_id, cursor):
        page = pages[int(cursor or 0)]
        return EventPage(events=[JobEvent(id=n, at=0.0) for n in page], cursor=str(min(int(cursor or 0) + 1, 2)))

    service.events = events
    assert [e.id for e in manager.events_sync(job.id)] == ["b", "a", "c"]
    assert [e.id for e in manager.events_sync(job.id)] == ["b", "a", "c"]


def test_a_service_whose_events_never_end_is_cut_off(submitted, service, manager):
    job, count = submitted(), iter(range(10**6))

    async def events(remote_id, cursor):
        return EventPage(events=[JobEvent(id="same", at=0.0)], cursor=str(next(count)))

    service.events = events
    assert len(manager.events_sync(job.id)) == 1  # it repeats itself
    service.events = lambda remote_id, cursor: _endless(count)
    with expect_error("provider-protocol", job.id):
        manager.events_sync(job.id)


async def _endless(count):
    number = str(next(count))
    return EventPage(events=[JobEvent(id=number, at=0.0)], cursor=number)


def test_a_loss_that_is_not_finite_is_kept_as_none(submitted, service, manager):
    job = submitted()

    async def events(remote_id, cursor):
        return EventPage(events=[JobEvent(id="1", at=0.0, metrics={"loss": float("nan"), "step": 1.0})], cursor="1")

    service.events = events
    assert manager.events_sync(job.id)[0].metrics == {"loss": None, "step": 1.0}
    assert manager.progress_sync(job.id).loss is None


def test_cancel_is_written_down_first_and_done_once(submitted, service, manager):
    job = submitted()
    ended = manager.cancel_sync(job.id)
    assert (ended.state, ended.cancel_requested is not None) == (JobState.CANCELED, True)
    assert manager.cancel_sync(job.id).state == JobState.CANCELED
    assert service.log.count("cancel") == 1
    steps = [s["step"] for s in manager.store.journal(job.id)]
    assert steps.index("cancel requested") < steps.index("cancel sent")


def test_a_job_that_completes_while_it_is_canceled_is_completed(submitted, service, manager):
    job = submitted()

    async def cancel(remote_id):
        service.put(remote_id, state="completed")
        raise ProviderError("invalid", "it has ended")

    service.cancel = cancel
    assert manager.cancel_sync(job.id).state == JobState.COMPLETED


def test_a_job_that_was_not_created_yet_is_canceled_without_a_request(submitted, service, manager):
    service.before = [ProviderError("network", "down")]
    with pytest.raises(ProviderError):
        submitted()
    service.log.clear()
    (job,) = manager.list_sync()
    assert manager.cancel_sync(job.id).state == JobState.CANCELED
    assert service.log == []


def test_a_cancel_while_it_is_unclear_whether_the_job_exists_looks_first(submitted, service, manager):
    service.faults = [ProviderError("lost", "no answer")]
    find, service.find = service.find, None

    async def broken(job, uploads):
        raise ProviderError("network", "down")

    service.find = broken
    with pytest.raises(ProviderError):
        submitted()
    (job,) = manager.list_sync()
    service.find = find
    assert manager.cancel_sync(job.id).state == JobState.CANCELED
    assert service.jobs()["r1"]["state"] == "canceled"


def test_the_plain_twins_work_inside_a_running_loop(submitted, manager):
    async def notebook():
        return manager.status_sync(submitted().id)

    assert asyncio.run(notebook()).state == JobState.PENDING
