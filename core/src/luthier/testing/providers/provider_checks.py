"""Checks of providers, first half: what is sent and what is not, and that a job is created exactly once."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError
from luthier.jobs.provider_error import ProviderError
from luthier.plugins.providing.job_state import JobState, Stage
from luthier.testing.laws import Subject, law
from luthier.testing.loopback import Reply
from luthier.testing.providers.provider_bench import CANARY, ROWS, Bench, open_bench
from luthier.testing.providers.provider_following import (
    a_cancelled_job_ends_once,
    a_cut_connection_is_borne,
    a_download_that_was_cut_is_whole,
    a_status_only_reads,
    an_unknown_state_is_unknown,
    an_unreadable_answer_is_told,
    events_come_once_each,
    every_documented_state_is_known,
    jobs_are_listed,
    results_are_given_or_refused_by_name,
)

__all__ = [
    "a_cancelled_job_ends_once",
    "a_cut_connection_is_borne",
    "a_download_that_was_cut_is_whole",
    "a_status_only_reads",
    "an_unknown_state_is_unknown",
    "an_unreadable_answer_is_told",
    "every_documented_state_is_known",
    "events_come_once_each",
    "jobs_are_listed",
    "results_are_given_or_refused_by_name",
]
QUOTA: Final = Reply(status=429, body={"error": {"message": "no credit", "code": "insufficient_quota"}})
REFUSED: Final = Reply(status=401, body={"error": {"message": f"the key {CANARY} is wrong"}})
LIMITED: Final = Reply(status=429, body={"error": {"message": "slow down"}}, headers={"retry-after": "7"})


@law(0, needs_torch=False)
def a_job_arrives_with_its_rows(subject: Subject) -> None:
    """A submitted job exists once at the service, with every row of the recipe, under the id that the store keeps."""
    with open_bench(subject) as bench:
        job = bench.submit()
        assert job.stage == Stage.CREATED and not job.is_final, f"it is {job.stage}, {job.state}"
        assert bench.fake.jobs() == [job.remote_id]
        arrived = bench.fake.rows(str(job.remote_id))
        assert len(arrived) == ROWS, f"{len(arrived)} of {ROWS} rows arrived"
        assert "What is 7 plus 7?" in str(arrived[7]) and "14" in str(arrived[7]), f"a row arrived as {arrived[7]!r}"


@law(0, needs_torch=False)
def a_broken_row_sends_nothing(subject: Subject) -> None:
    """A row that cannot be read is refused with its file and line, before any request."""
    with open_bench(subject) as bench:
        bench.write_rows(ROWS, broken=17)
        error = _refused(bench)
        assert "rows.jsonl:17" in str(error), f"the error does not name the line: {error}"
        _assert_silent(bench)


@law(0, needs_torch=False)
def a_setting_that_is_not_offered_sends_nothing(subject: Subject) -> None:
    """A setting or loss that the service does not have is refused by name, before any request."""
    with open_bench(subject) as bench:
        if bench.fake.upload is None:
            return  # a provider of recipes sends the whole recipe, with every setting
        error = _refused(bench, layerwise_lr_decay=0.5)
        assert "layerwise_lr_decay" in str(error), f"the error does not name the setting: {error}"
        _assert_silent(bench)


@law(0, needs_torch=False)
def a_plain_address_gets_no_key(subject: Subject) -> None:
    """An address without TLS, other than this machine's own, is refused before the key is sent."""
    with open_bench(subject) as bench:
        part = subject.build(bench.fake.options("http://service.example", "env:PROVIDER_CANARY_KEY"))
        try:
            bench.submit(part=part)
        except LuthierError as error:
            assert error.code == "insecure-url", f"refused for another reason: {error}"
            return
        raise AssertionError("the address was accepted")


@law(0, needs_torch=False)
def a_lost_answer_makes_one_job(subject: Subject) -> None:
    """If the service created the job, but its answer was lost, cut or hidden by an error, there is one job."""
    for kind in ("lost", "masked", "cut"):
        with open_bench(subject) as bench:
            bench.fault(kind, bench.fake.create, Reply(status=502, body={}) if kind == "masked" else None)
            job = bench.submit()
            _assert_one(bench, job)


@law(0, needs_torch=False)
def a_request_that_never_arrived_is_sent_again(subject: Subject) -> None:
    """If the connection broke before the service acted, the job is created in the end, once."""
    with open_bench(subject) as bench:
        bench.fault("refused", bench.fake.create)
        _assert_one(bench, bench.submit())


@law(0, needs_torch=False)
def a_job_that_is_listed_late_is_waited_for(subject: Subject) -> None:
    """If the service lists a new job only after some seconds, the job is still found and not created again."""
    with open_bench(subject) as bench:
        part, looks = bench.build(), []
        find = part.find

        async def find_late(job: Any, uploads: Any) -> Any:
            looks.append(bench.clock.now())
            return [] if len(looks) < 3 else await find(job, uploads)

        part.find = find_late
        bench.fault("lost", bench.fake.create)
        _assert_one(bench, bench.submit(part=part))


@law(0, needs_torch=False)
def a_death_at_any_step_makes_one_job(subject: Subject) -> None:
    """If the process dies between any two steps of the journal, another process continues and there is one job."""
    for last in range(1, 9):
        with open_bench(subject) as bench:
            if not _died_at(bench, last):
                assert last > 3, "the journal has fewer steps than a submission needs"
                return
            manager = bench.start_manager()
            (waiting,) = manager.list_sync()
            manager.use_provider(waiting.id, bench.build())
            job = manager.attach_sync(waiting.id)
            manager.close()
            _assert_one(bench, job)


@law(0, needs_torch=False)
def a_death_before_the_answer_is_kept_makes_one_job(subject: Subject) -> None:
    """If the service has created the job and the process dies before it writes that down, there is one job."""
    with open_bench(subject) as bench:
        part, manager = bench.build(), bench.start_manager()
        submit = part.submit

        async def submit_and_die(job: Any, uploads: Any) -> Any:
            await submit(job, uploads)
            raise _Death

        part.submit = submit_and_die
        try:
            bench.submit(manager, part)
        except _Death:
            manager.close()
        other = bench.start_manager()
        (waiting,) = other.list_sync()
        other.use_provider(waiting.id, bench.build())
        job = other.attach_sync(waiting.id)
        other.close()
        _assert_one(bench, job)


@law(0, needs_torch=False)
def other_peoples_jobs_are_not_taken(subject: Subject) -> None:
    """An earlier job that looks the same is not mistaken for this one."""
    with open_bench(subject) as bench:
        first = bench.submit()
        bench.fault("refused", bench.fake.create)
        second = bench.submit()
        assert first.remote_id != second.remote_id, "the first job was mistaken for the second"
        assert len(bench.fake.jobs()) == 2


@law(0, needs_torch=False)
def a_wrong_key_is_asked_once(subject: Subject) -> None:
    """A refused key or a used-up quota is reported at once, by its kind, and not tried again."""
    for reply, kinds in ((REFUSED, ("auth", "permission")), (QUOTA, ("quota",))):
        with open_bench(subject) as bench:
            bench.fault("answer", (".*", ".*"), reply, times=99)
            error = _refused(bench)
            assert isinstance(error, ProviderError) and error.kind in kinds, f"it is told as {error}"
            assert len(bench.server.requests) == 1, f"{len(bench.server.requests)} requests were sent"


@law(0, needs_torch=False)
def a_busy_service_is_waited_for(subject: Subject) -> None:
    """A creation that was turned away for its rate is sent again after the time that the service asks for."""
    with open_bench(subject) as bench:
        bench.fault("answer", bench.fake.create, LIMITED)
        _assert_one(bench, bench.submit())
        assert any(7.0 <= wait < 60 for wait in bench.clock.slept), f"waits were {bench.clock.slept}"


@law(0, needs_torch=False)
def the_same_bytes_are_sent_once(subject: Subject) -> None:
    """Rows that the service already has are not sent again for another job."""
    with open_bench(subject) as bench:
        if bench.fake.upload is None:
            return
        bench.submit()
        sent = bench.count(bench.fake.upload)
        assert sent >= 1, "no upload was seen: the fake's `upload` does not match"
        bench.submit()
        assert bench.count(bench.fake.upload) == sent, "they were sent again"


@law(0, needs_torch=False)
def a_key_shows_nowhere(subject: Subject) -> None:
    """No key appears in a log, a text of the part, an error or a file of the store; none goes to a signed link."""
    records: list[str] = []
    handler = _Keeper(records)
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with open_bench(subject) as bench:
            part = bench.build()
            job = bench.submit(part=part)
            bench.manager.events_sync(job.id)
            bench.finish(job)
            bench.manager.wait_sync(job.id)
            texts = [repr(part), str(vars(part) if hasattr(part, "__dict__") else ""), str(job.to_dict())]
            bench.fault("answer", (".*", ".*"), REFUSED, times=99)
            texts.append(str(_refused(bench)))
            files = [path.read_bytes().decode("latin-1") for path in Path(bench.folder).rglob("*") if path.is_file()]
            _assert_hidden(records, "a log")
            _assert_hidden(texts, "a text of the part, its job or its error")
            _assert_hidden(files, "a file of the store")
            _assert_kept_home(bench)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


class _Keeper(logging.Handler):
    def __init__(self, records: list[str]) -> None:
        super().__init__(logging.DEBUG)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record.getMessage())


class _Death(BaseException):
    """The end of a process, simulated within this one."""


def _died_at(bench: Bench, last: int) -> bool:
    """Submit until the journal's step with this number. Return False if there is no such step."""
    left = [last]

    def die(job: str, step: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise _Death

    manager = bench.start_manager(die)
    try:
        bench.submit(manager)
    except _Death:
        return True
    finally:
        manager.close()
    return False


def _assert_one(bench: Bench, job: Any) -> None:
    made = bench.fake.jobs()
    assert len(made) == 1, f"{len(made)} jobs were made: {', '.join(made)}"
    assert job.remote_id == made[0], f"the job is kept as {job.remote_id}, and the service has {made[0]}"
    assert job.state in (JobState.PENDING, JobState.RUNNING)


def _refused(bench: Bench, **more: Any) -> LuthierError:
    try:
        bench.submit(**more)
    except LuthierError as error:
        return error
    raise AssertionError("it was accepted")


def _assert_silent(bench: Bench) -> None:
    sent = [f"{r.method} {r.path}" for r in bench.server.requests]
    assert not sent, f"requests were sent nevertheless: {', '.join(sent)}"


def _assert_hidden(texts: list[str], where: str) -> None:
    leaks = [text for text in texts if CANARY in text]
    assert not leaks, f"the key stands in {where}: {leaks[0][:200]!r}"


def _assert_kept_home(bench: Bench) -> None:
    signed = bench.fake.signed
    for request in bench.server.requests:
        if signed is not None and re.search(signed, request.path):
            assert CANARY not in str(request.headers), f"the key went to the signed link {request.path}"
