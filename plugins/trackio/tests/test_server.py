"""The callback `trackio` at a server of one's own, which is the library's, on the loopback; and what a Space is asked."""

import socket
from types import SimpleNamespace

import pytest
from luthier.testing import expect_error


@pytest.fixture
def closed():
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_numbers_go_to_the_server_under_the_id_that_a_resumed_run_continues(
    build, hooks, rows_of, run, project, server
):
    before = build(project=project, server_url=server)
    fire = hooks(before)
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    fire.stopped(run=run, step=1, reason="signal 15")
    after = build(project=project, server_url=server)
    after.load_state(before.state())
    fire = hooks(after)
    fire.resumed(run=run, step=1)
    fire.logged(run=run, step=2, metrics={"loss": 2.0})
    fire.completed(run=run, result=None)
    assert rows_of(project, before.state()["trackio_id"]) == [(1, {"loss": 3.0}), (2, {"loss": 2.0})]


def test_the_address_may_come_from_the_environment(build, hooks, run, project, server, monkeypatch):
    import trackio

    monkeypatch.setenv("TRACKIO_SERVER_URL", server)
    fire = hooks(build(project=project))
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    fire.completed(run=run, result=None)
    assert len(trackio.Api().runs(project)) == 1


def test_no_server_is_an_error_before_the_first_step_that_does_not_tell_the_token(
    build, hooks, run, project, closed, monkeypatch
):
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "hunter2")
    fire = hooks(build(project=project, server_url=closed))
    with expect_error("part-unsupported", "callback 'trackio'", closed) as caught:
        fire.run_started(run=run)
    assert "server_url" in caught.value.remedy
    assert "hunter2" not in str(caught.value)


def test_a_space_is_opened_with_the_options_and_the_id_of_the_run_that_is_continued(build, hooks, run, monkeypatch):
    build()
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    told, rows = [], []
    opened = SimpleNamespace(id="new", log=lambda metrics, step: rows.append((step, metrics)), finish=lambda: None)
    monkeypatch.setattr("trackio.init", lambda *some, **named: told.append((some, named)) or opened)
    callback = build(space_id="team/dashboard", private=True, group="g")
    callback.load_state({"trackio_id": "before"})
    fire = hooks(callback)
    fire.resumed(run=run, step=1)
    fire.logged(run=run, step=2, metrics={"loss": 2.0})
    fire.completed(run=run, result=None)
    ((given, named),) = told
    assert given == ("luthier", "first", "g", "team/dashboard")
    assert named["private"] is True
    assert (opened.id, rows) == ("before", [(2, {"loss": 2.0})])
