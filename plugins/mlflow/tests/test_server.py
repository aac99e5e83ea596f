"""The callback `mlflow` with a tracking server on the loopback, and what happens when there is none."""

import base64
import json

import pytest
from luthier import LuthierError
from luthier.testing import captured_logs

CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens


def test_numbers_go_to_the_address_given(build, hooks, run, server):
    callback = build(tracking_uri=server.url, tags={"team": "search"})
    fire = hooks(callback)
    fire.run_started(run=run)
    fire.logged(run=run, step=3, metrics={"loss": 2.5})
    fire.completed(run=run, result=None)
    sent = [each["metrics"] for act, each in server.asked if act == "runs/log-batch" and "metrics" in each]
    assert [(m["key"], m["value"], int(m["step"])) for (m,) in sent] == [("loss", 2.5, 3)]
    (made,) = [each for act, each in server.asked if act == "runs/create"]
    assert (made["experiment_id"], made["run_name"]) == ("7", "first")
    assert {"key": "team", "value": "search"} in made["tags"]
    assert callback.state() == {"mlflow_id": "served1"}


def test_credentials_come_from_the_environment(build, hooks, run, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    hooks(build(tracking_uri=server.url)).run_started(run=run)
    assert server.keys == {"Basic " + base64.b64encode(b"me:hunter2").decode()}


def test_a_resumed_run_asks_the_server_for_the_same_run(build, hooks, run, server):
    callback = build(tracking_uri=server.url)
    callback.load_state({"mlflow_id": "before12"})
    fire = hooks(callback)
    fire.resumed(run=run, step=4)
    fire.logged(run=run, step=5, metrics={"loss": 2.0})
    assert {each["run_id"] for act, each in server.asked if act in ("runs/update", "runs/log-batch")} == {"before12"}
    assert "runs/create" not in [act for act, _ in server.asked]


def test_building_the_callback_asks_the_server_nothing(build, server):
    build(tracking_uri=server.url)
    assert server.asked == []


def test_no_server_is_an_error_before_the_first_step(build, hooks, run):
    fire = hooks(build(tracking_uri=CLOSED))
    with pytest.raises(LuthierError, match="127.0.0.1:9") as caught:
        fire.run_started(run=run)
    assert caught.value.code == "part-unsupported"
    assert caught.value.where == "callback 'mlflow'"
    assert "tracking_uri" in caught.value.remedy


def test_a_server_that_goes_away_is_said_once_and_training_goes_on(build, hooks, run, server):
    fire = hooks(build(tracking_uri=server.url))
    fire.run_started(run=run)
    server.stop()
    with captured_logs() as lines:
        for step in range(1, 9):
            fire.logged(run=run, step=step, metrics={"loss": 3.0})
        fire.completed(run=run, result=None)
    (line,) = lines
    assert (line["event"], line["during"], line["level"]) == ("tracker_failed", "logged", "error")


def test_a_secret_in_the_environments_address_is_neither_logged_nor_raised(build, hooks, run, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("//", "//me:hunter2@"))
    fire = hooks(build())
    with captured_logs() as lines:
        fire.run_started(run=run)
        server.stop()
        fire.logged(run=run, step=1, metrics={"loss": 3.0})
    assert [line["event"] for line in lines] == ["tracker_opened", "tracker_failed"]
    assert "hunter2" not in str(lines)
    with pytest.raises(LuthierError) as caught:
        fire.run_started(run=run)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", ["https://me:hunter2@mlflow.example", "postgresql://me:hunter2@db/mlflow"])
def test_a_secret_in_the_options_address_is_refused_and_not_repeated(build, uri):
    with pytest.raises(LuthierError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        build(tracking_uri=uri)
    assert "hunter2" not in json.dumps(caught.value.to_dict())


@pytest.mark.parametrize(("uri", "said"), [("htps://mlflow.example", "htps"), ("mlruns", "sqlite")])
def test_an_address_that_mlflow_cannot_use_is_an_error_when_the_callback_is_built(build, uri, said):
    with pytest.raises(LuthierError, match=said) as caught:
        build(tracking_uri=uri)
    assert caught.value.code == "part-unsupported"
