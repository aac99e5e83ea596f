"""The callback `wandb` online, against a server on the loopback, and what happens when there is none."""

import base64
import json
import os
import subprocess
import sys

import pytest
from luthier import LuthierError
from luthier.testing import captured_logs, expect_error

KEY = "k" * 40
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens

SERVICE_DIES = """
import sys
from types import SimpleNamespace
import psutil
from luthier_wandb import Wandb
from luthier_wandb.tracker import Tracker

run = SimpleNamespace(run_id="r", folder=sys.argv[1], name="n", settings={}, is_main=True)
tracker = Tracker(Wandb(mode="offline"))
tracker.run_started(run)
for child in psutil.Process().children(recursive=True):
    child.kill()
    child.wait()
for step in range(1, 9):
    tracker.logged(step, {"loss": 1.0})
tracker.completed()
print("trained to the end")
"""


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def test_numbers_go_to_the_address_given_with_the_key_of_the_environment(build, hooks, run, server, key):
    fire = hooks(build(mode="online", base_url=server.url, project="p", tags=["a"]))
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    fire.logged(run=run, step=2, metrics={"loss": 2.0})
    fire.completed(run=run, result=None)
    assert [(row["_step"], row["loss"]) for row in server.rows] == [(1, 3.0), (2, 2.0)]
    assert server.exit_codes == [0]
    assert server.keys == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}
    told = server.opened[0]
    assert (told["project"], told["displayName"], told["tags"]) == ("p", "first", ["a"])


def test_naming_the_tracker_is_asking_for_the_server(build, hooks, run, server, fresh, key, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    fire = hooks(build())
    fire.run_started(run=run)
    fire.completed(run=run, result=None)
    assert server.opened


def test_a_resumed_run_asks_the_server_for_the_same_run(build, hooks, run, server, key):
    callback = build(mode="online", base_url=server.url)
    callback.load_state({"wandb_id": "before12"})
    fire = hooks(callback)
    fire.resumed(run=run, step=4)
    fire.logged(run=run, step=5, metrics={"loss": 3.0})
    fire.completed(run=run, result=None)
    assert {told["name"] for told in server.opened} == {"before12"}
    assert [row["_step"] for row in server.rows] == [5]


def test_steps_that_the_server_holds_are_not_sent_again(build, hooks, run, server, key):
    server.held = 7
    callback = build(mode="online", base_url=server.url)
    callback.load_state({"wandb_id": "before12"})
    fire = hooks(callback)
    fire.resumed(run=run, step=5)
    for step in range(6, 10):
        fire.logged(run=run, step=step, metrics={"loss": float(step)})
    fire.completed(run=run, result=None)
    assert [row["_step"] for row in server.rows] == [8, 9]


def test_the_address_of_the_run_is_logged(build, hooks, run, server, key):
    fire = hooks(build(mode="online", base_url=server.url, project="p"))
    with captured_logs() as lines:
        fire.run_started(run=run)
    fire.completed(run=run, result=None)
    assert lines[0]["event"] == "tracker_opened"
    assert lines[0]["url"] == f"{server.url}/team/p/runs/{lines[0]['id']}"


def test_no_server_is_an_error_before_the_first_step(build, hooks, run, key, fresh, monkeypatch):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    fire = hooks(build(mode="online", base_url=CLOSED))
    with pytest.raises(LuthierError, match="127.0.0.1:9/graphql") as caught:
        fire.run_started(run=run)
    assert caught.value.code == "part-unsupported"
    assert "mode: offline" in caught.value.remedy
    assert KEY not in str(caught.value)


def test_a_server_that_goes_away_is_waited_for_and_said_once(build, hooks, run, server, key):
    fire = hooks(build(mode="online", base_url=server.url, finish_timeout=0.5))
    fire.run_started(run=run)
    server.stop()
    with captured_logs() as lines:
        for step in range(1, 9):
            fire.logged(run=run, step=step, metrics={"loss": 3.0})
        fire.completed(run=run, result=None)
    (line,) = lines
    assert (line["event"], line["during"], line["level"]) == ("tracker_failed", "completed", "error")
    assert "TimeoutError" in line["error"]
    assert f"wandb sync {run.folder}" in line["remedy"]


def test_a_client_that_dies_is_said_once_and_training_goes_on(tmp_path):
    alone = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # else it would join this process's service
    command = [sys.executable, "-c", SERVICE_DIES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=alone, check=False)
    assert done.stderr.count("[error    ] tracker_failed") == 1, done.stderr
    assert done.stdout.rstrip() == "trained to the end"
    assert done.returncode == 0


@pytest.mark.parametrize("options", [{"mode": "online"}, {}, {"mode": "online", "base_url": "https://wandb.example"}])
def test_a_missing_key_is_an_error_when_the_callback_is_built(build, fresh, options):
    with expect_error("recipe-missing", "callback 'wandb'", "https://") as caught:
        build(**options)
    assert caught.value.code == "recipe-missing"
    assert "WANDB_API_KEY" in caught.value.remedy


def test_a_key_in_netrc_is_enough(build, fresh, tmp_path):
    (tmp_path / "netrc").write_text(f"machine wandb.example login user password {KEY}\n")
    build(mode="online", base_url="https://wandb.example")


def test_offline_and_disabled_need_no_key(build, fresh):
    build(mode="offline")
    build(mode="disabled")


def test_wandb_mode_offline_needs_no_key(build, fresh, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    build()


@pytest.mark.parametrize(
    ("option", "value"),
    [("project", "a/b"), ("tags", ["x" * 65]), ("base_url", "nonsense")],
)
def test_a_value_that_the_client_refuses_is_an_error_that_names_it(build, option, value):
    with pytest.raises(LuthierError, match=option) as caught:
        build(**{"mode": "offline", option: value})
    assert caught.value.code == "recipe-out-of-range"


def test_a_secret_in_the_address_is_refused_and_not_repeated(build):
    with pytest.raises(LuthierError, match="WANDB_API_KEY") as caught:
        build(base_url="https://user:hunter2@wandb.example")
    assert "hunter2" not in json.dumps(caught.value.to_dict())
