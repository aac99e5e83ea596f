"""States move only as they may; the store survives restarts and several processes."""

import subprocess
import sys

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier import JobState, JobStatus, LuthierError, Manager
from luthier.jobs.making.preparing import raise_refusals
from luthier.jobs.restoring import restore_provider
from luthier.plugins.providing.job_records import Finding
from luthier.plugins.providing.job_state import advance_state
from luthier.testing import expect_error

FINAL = [s for s in JobState if s.is_final]


@given(st.lists(st.sampled_from(list(JobState)), min_size=1))
def test_a_final_state_is_never_left(reports):
    state, ended = JobState.PENDING, None
    for report in reports:
        state, legal = advance_state(state, report)
        assert legal == (ended is None or report == ended)
        assert ended is None or state == ended
        ended = ended or (state if state.is_final else None)


def test_unknown_is_not_final_and_not_pending():
    assert not JobState.UNKNOWN.is_final
    assert advance_state(JobState.RUNNING, JobState.UNKNOWN) == (JobState.UNKNOWN, True)


@pytest.mark.parametrize("final", FINAL)
def test_the_store_keeps_a_final_state_and_the_follower_tells_what_came_after(submitted, service, manager, final):
    job = submitted()
    service.put("r1", state=final.value)
    assert manager.status_sync(job.id).state == final
    late = JobStatus(remote_id="r1", state=JobState.RUNNING, raw_state="running")
    kept, legal = manager.store.save_status(job.id, late, 0.0)
    assert (kept.state, legal) == (final, False)


def test_jobs_are_found_by_id_its_ends_and_the_services_id(submitted, manager):
    job = submitted()
    for name in (job.id, job.id[:16], job.id[-5:], "r1"):
        assert manager.store.find_job(name).id == job.id
    with expect_error("job-not-found", "store"):
        manager.store.find_job("nothing")
    submitted()
    with pytest.raises(LuthierError) as caught:
        manager.store.find_job("1970")
    assert caught.value.code == "job-ambiguous"
    with pytest.raises(LuthierError):
        manager.store.find_job("%")


def test_jobs_are_listed_by_state_and_provider_the_newest_first(submitted, service, manager, clock):
    first = submitted()
    clock.time += 60
    second = submitted()
    assert [j.id for j in manager.list_sync()] == [second.id, first.id]
    service.put(first.remote_id, state="failed")
    manager.status_sync(first.id)
    assert [j.id for j in manager.list_sync(status="failed")] == [first.id]
    assert manager.list_sync(provider="together") == []
    assert [j.id for j in manager.list_sync(limit=1)] == [second.id]


def test_another_manager_finds_what_one_has_left(submitted, tmp_path, manager):
    job = submitted()
    manager.close()
    other = Manager(tmp_path / "store")
    found = other.store.get_job(job.id)
    assert (found.remote_id, found.state, found.spec.model) == ("r1", JobState.PENDING, "demo")
    assert [step["step"] for step in other.store.journal(job.id)] == [
        "intent",
        "uploaded",
        "creating",
        "created",
        "state pending",
    ]
    other.close()


def test_several_processes_write_to_one_store(tmp_path):
    script = """
import sys
from pathlib import Path
from luthier import JobSpec
from luthier.jobs.store.job_store import JobStore
store = JobStore(Path(sys.argv[1]))
for i in range(20):
    spec = JobSpec(id=f"{sys.argv[2]}-{i}", provider="p", options={}, scope="", model="m", method="sft", settings={},
                   folder=Path("f"), output_dir=None)
    store.add_job(spec, 0.0)
    store.note_step(spec.id, "step", 1.0)
"""
    running = [subprocess.Popen([sys.executable, "-c", script, tmp_path, name]) for name in "abc"]
    assert [p.wait() for p in running] == [0, 0, 0]
    manager = Manager(tmp_path)
    assert len(manager.list_sync()) == 60
    manager.close()


def test_a_damaged_store_is_told(tmp_path):
    (tmp_path / "jobs.sqlite").write_text("no database" * 100)
    with pytest.raises(LuthierError) as caught:
        Manager(tmp_path)
    assert caught.value.code == "job-store-damaged"


def test_a_job_of_another_account_is_not_spoken_of_with_this_one(submitted):
    job = submitted()
    spec = attrs.evolve(job.spec, provider="local", options={}, scope="another machine")
    with pytest.raises(LuthierError) as caught:
        restore_provider(attrs.evolve(job, spec=spec))
    assert caught.value.code == "job-elsewhere"


def test_what_a_provider_does_not_offer_is_refused_with_every_finding():
    findings = [Finding(level="error", rule=name, message=f"no {name}", where=name) for name in ("loss", "adapter")]
    with pytest.raises(LuthierError) as caught:
        raise_refusals(findings, "service")
    assert (caught.value.code, caught.value.where) == ("provider-unsupported", "loss")
