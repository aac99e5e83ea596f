"""Checks of providers, second half: states, events, lists, cancelling and results."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from luthier.errors import LuthierError
from luthier.jobs.provider_error import ProviderError
from luthier.plugins.providing.job_records import Job
from luthier.plugins.providing.job_state import JobState
from luthier.testing.laws import Subject, law
from luthier.testing.loopback import Reply, Request
from luthier.testing.providers.provider_bench import Bench, open_bench


@law(0, needs_torch=False)
def every_documented_state_is_known(subject: Subject) -> None:
    """Each state that the service documents is reported as one of ours, with the service's own word."""
    with open_bench(subject) as bench:
        job = bench.submit()
        for raw, state in bench.fake.states.items():
            bench.fake.set_state(str(job.remote_id), raw)
            status = _asked(bench, lambda part: part.status(str(job.remote_id)))
            assert (status.state, status.raw_state) == (state, raw), (
                f"{raw!r} is reported as {status.state}, {status.raw_state!r}"
            )


@law(0, needs_torch=False)
def an_unknown_state_is_unknown(subject: Subject) -> None:
    """An undocumented state is reported as `unknown`: neither an error nor final, and waiting continues."""
    with open_bench(subject) as bench:
        job = bench.submit()
        bench.fake.set_state(str(job.remote_id), "PREHEATING_9")
        status = bench.manager.status_sync(job.id)
        word = getattr(bench.fake, "unknown", "PREHEATING_9")
        assert (status.state, status.raw_state) == (JobState.UNKNOWN, word), f"it is {status.state}, {status.raw_state}"
        bench.finish(job)
        assert bench.manager.wait_sync(job.id).state == JobState.COMPLETED


@law(0, needs_torch=False)
def a_status_only_reads(subject: Subject) -> None:
    """Reading a job's state, its events and the list of jobs changes nothing at the service."""
    with open_bench(subject) as bench:
        job = bench.submit()
        before = len(bench.server.requests)
        bench.manager.status_sync(job.id)
        bench.manager.events_sync(job.id)
        _asked(bench, lambda part: part.list(10))
        methods = {f"{r.method} {r.path}" for r in bench.server.requests[before:] if not _is_reading(bench, r)}
        assert not methods, f"it sent {', '.join(sorted(methods))}"


@law(0, needs_torch=False)
def a_cut_connection_is_borne(subject: Subject) -> None:
    """A reading that fails in passing (a cut, a lost answer, a 500, a 429) is repeated without an error."""
    with open_bench(subject) as bench:
        job = bench.submit()
        for kind, reply in (("lost", None), ("cut", None), ("answer", Reply(status=500, body={})),
                            ("answer", Reply(status=429, body={}, headers={"retry-after": "1"}))):  # fmt: skip
            bench.fault(kind, ("GET", ".*"), reply)
            assert bench.manager.status_sync(job.id).remote_id == job.remote_id
        assert len(bench.fake.jobs()) == 1


@law(0, needs_torch=False)
def an_unreadable_answer_is_told(subject: Subject) -> None:
    """An answer that is HTML, half a document or an error is reported as unreadable, not taken for a state."""
    for body in (b"<html>maintenance</html>", b'{"id": "x', b'{"error": {"message": "no"}}'):
        with open_bench(subject) as bench:
            job = bench.submit()
            bench.fault("answer", ("GET", ".*"), Reply(body=body), times=99)
            try:
                status = bench.manager.status_sync(job.id)
            except ProviderError:
                continue
            raise AssertionError(f"{body!r} was mistaken for the state {status.state}")


@law(0, needs_torch=False)
def a_cancelled_job_ends_once(subject: Subject) -> None:
    """A job can be cancelled; cancelling it again, or after its end, is no error and changes nothing."""
    with open_bench(subject) as bench:
        job, before = bench.submit(), len(bench.server.requests)
        bench.manager.cancel_sync(job.id)
        sent = [r.method for r in bench.server.requests[before:] if not _is_reading(bench, r)]
        assert sent, "the service was not asked to end the job"
        bench.finish(job, JobState.CANCELED)
        assert bench.manager.wait_sync(job.id).state == JobState.CANCELED
        assert bench.manager.cancel_sync(job.id).state == JobState.CANCELED
        other = bench.submit()
        bench.finish(other)
        assert bench.manager.cancel_sync(other.id).state == JobState.COMPLETED, (
            "a job that had completed is not completed"
        )


@law(0, needs_torch=False)
def jobs_are_listed(subject: Subject) -> None:
    """The jobs of the account are listed, each once, and at most as many as requested."""
    with open_bench(subject) as bench:
        ids = {bench.submit().remote_id for _ in range(3)}
        listed = [status.remote_id for status in _asked(bench, lambda part: part.list(100))]
        assert len(listed) == len(set(listed)), f"some are listed twice: {listed}"
        assert ids == set(listed), f"made {sorted(map(str, ids))}, listed {sorted(listed)}"
        assert len(_asked(bench, lambda part: part.list(2))) == 2


@law(0, needs_torch=False)
def events_come_once_each(subject: Subject) -> None:
    """Each event is read once, steps come in order, and a later reading continues where the last one ended."""
    with open_bench(subject) as bench:
        job = bench.submit()
        first = bench.manager.events_sync(job.id)
        bench.manager.close()
        bench.manager = bench.start_manager()
        bench.manager.use_provider(job.id, bench.build())
        again = bench.manager.events_sync(job.id)
        assert [e.id for e in first] == [e.id for e in again], "another manager reads other events"
        counts = [event.metrics.get("step") for event in again if event.kind == "metrics"]
        steps = [step for step in counts if step is not None]
        assert steps == sorted(steps), f"the steps come as {steps}"
        if steps:
            assert bench.manager.progress_sync(job.id).step == int(max(steps))


@law(0, needs_torch=False)
def results_are_given_or_refused_by_name(subject: Subject) -> None:
    """A completed job's weights are downloaded with a manifest, or refused with the name of the hosted model."""
    with open_bench(subject) as bench:
        job = _completed(bench)
        try:
            got = bench.manager.download_sync(job.id, bench.folder / "got")
        except ProviderError as error:
            assert bench.fake.download is None, f"the fake has files, but the part refuses: {error}"
            hosted = bench.manager.store.get_job(job.id).status
            assert error.kind == "unsupported" and hosted is not None and str(hosted.result_model) in str(error), str(
                error
            )
            return
        assert got.files and got.remote_id == job.remote_id and (got.path / "artifact.json").is_file()
        assert all((got.path / name).is_file() for name in got.files)


@law(0, needs_torch=False)
def a_download_that_was_cut_is_whole(subject: Subject) -> None:
    """A download that is cut continues and gives the same file as one without a cut; no partial file has the final
    name.
    """
    with open_bench(subject) as bench:
        if bench.fake.download is None:
            return
        job = _completed(bench)
        whole = bench.manager.download_sync(job.id, bench.folder / "whole").files
        bench.fault("cut", bench.fake.download)
        assert bench.manager.download_sync(job.id, bench.folder / "cut").files == whole
        bench.fault("answer", bench.fake.download, Reply(status=404, body={}), times=9)
        try:
            bench.manager.download_sync(job.id, bench.folder / "gone")
        except LuthierError:
            left = [
                p.name for p in (bench.folder / "gone").rglob("*") if p.is_file() and not p.name.endswith(".partial")
            ]
            assert not left, f"these files were left: {left}"
            return
        raise AssertionError("a missing download was accepted")


def _completed(bench: Bench) -> Job:
    job = bench.submit()
    bench.finish(job)
    return bench.manager.wait_sync(job.id)


def _is_reading(bench: Bench, request: Request) -> bool:
    reads = getattr(bench.fake, "reads", None)
    return request.method in ("GET", "HEAD") or (reads is not None and re.search(reads, request.path) is not None)


def _asked(bench: Bench, act: Any) -> Any:
    """Return what the part itself returns, and close its connections afterwards."""

    async def ask() -> Any:
        part = bench.build()
        try:
            return await act(part)
        finally:
            await part.close()

    return asyncio.run(ask())
