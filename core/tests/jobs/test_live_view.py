"""Followed jobs on a screen: a table or a bar that moves on a terminal, lines in a pipe, and errors that stop no other."""

import io

import pytest
from luthier import JobState, ProviderError
from luthier.cli.screen.live_jobs import FollowedJob, follow_jobs, live_view
from rich.console import Console


def screen_of(*, terminal, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def script_states(service, *states):
    """Let the service report these states of every job, one look after the other, and stay at the last."""
    left, status = list(states), service.status

    async def report(remote_id):
        service.put(remote_id, state=left.pop(0) if len(left) > 1 else left[0])
        return await status(remote_id)

    service.status = report


def test_jobs_are_followed_side_by_side_in_lines_that_begin_with_their_id(submitted, service, manager):
    jobs, screen = [submitted(), submitted()], screen_of(terminal=False)
    script_states(service, "running", "running", "running", "completed")
    assert follow_jobs(manager, jobs, screen) == {}
    lines = screen.file.getvalue().splitlines()
    assert {line.split()[0] for line in lines} == {job.id for job in jobs}
    assert all(manager.store.get_job(job.id).state == JobState.COMPLETED for job in jobs)


def test_a_terminal_sees_a_table_with_the_newest_states(submitted, service, manager):
    jobs, screen = [submitted(), submitted()], screen_of(terminal=True)
    script_states(service, "running", "completed")
    follow_jobs(manager, jobs, screen)
    shown = screen.file.getvalue()
    assert all(job.id in shown for job in jobs)
    assert "completed" in shown
    assert "step 1" not in shown  # no event is printed beside the table


def test_a_job_that_cannot_be_followed_stops_no_other(submitted, service, manager):
    jobs, status = [submitted(), submitted()], service.status

    async def refuse_first(remote_id):
        if remote_id == jobs[0].remote_id:
            raise ProviderError("auth", "the key is refused")
        service.put(remote_id, state="completed")
        return await status(remote_id)

    service.status = refuse_first
    errors = follow_jobs(manager, jobs, screen_of(terminal=False))
    assert {id: error.kind for id, error in errors.items()} == {jobs[0].id: "auth"}
    assert manager.store.get_job(jobs[1].id).state == JobState.COMPLETED


def test_the_line_of_a_job_shows_its_newest_numbers(submitted, manager, service):
    job, told = submitted(), screen_of(terminal=False)
    script_states(service, "running", "completed")
    line = FollowedJob(manager, job.id)
    told.print(line.draw_line())
    assert told.file.getvalue().strip() == "pending"
    manager.wait_sync(job.id, listener=line.note_event)
    [event] = [e for e in manager.events_sync(job.id) if e.metrics.get("step") == 6]
    line.note_event(type(event)(id="7", at=7.0, metrics={"step": 7.0, "total_steps": 9.0, "loss": 1.25}))
    told.print(line.draw_line())
    last = told.file.getvalue().splitlines()[-1]
    assert last.startswith("completed")
    assert "7/9" in last
    assert "loss 1.2500" in last


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_is_drawn_on_again_and_again(terminal):
    screen = screen_of(terminal=terminal)
    with live_view(screen, lambda: "the newest state"):
        screen.print("an event")
    assert ("the newest state" in screen.file.getvalue()) is terminal
    assert "an event" in screen.file.getvalue()
