"""The callback `wandb` offline, by what its client wrote to its files."""

import json
import math

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from luthier.runs.writing.active_run import ActiveRun
from luthier.testing import captured_logs

NAMES = [
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "peak_memory",
    "epoch",
]
METRICS = st.dictionaries(st.sampled_from(NAMES), st.floats(allow_nan=False, allow_infinity=False), min_size=1)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(METRICS, min_size=1, max_size=5))
def test_every_number_is_recorded_under_its_own_name_at_its_own_step(tmp_path_factory, build, hooks, recorded, lines):
    run = ActiveRun(run_id="r", folder=tmp_path_factory.mktemp("run"), name="n", settings={}, total_steps=len(lines))
    fire = hooks(build(mode="offline"))
    fire.run_started(run=run)
    for step, metrics in enumerate(lines, 1):
        fire.logged(run=run, step=step, metrics=metrics)
    fire.completed(run=run, result=None)
    (found,) = recorded(run.folder)
    assert found.rows == dict(enumerate(lines, 1))


def test_an_evaluation_stands_in_the_row_of_its_step(build, hooks, recorded, run):
    fire = hooks(build(mode="offline"))
    fire.run_started(run=run)
    fire.evaluated(run=run, step=0, metrics={"eval_loss": 4.0})
    fire.logged(run=run, step=2, metrics={"loss": 3.0})
    fire.evaluated(run=run, step=2, metrics={"eval_loss": float("nan")})
    fire.completed(run=run, result=None)
    (found,) = recorded(run.folder)
    assert found.rows[0] == {"eval_loss": 4.0}
    assert found.rows[2]["loss"] == 3.0
    assert math.isnan(found.rows[2]["eval_loss"])


def test_the_recipe_is_the_config_and_the_run_has_its_name_and_id(build, hooks, recorded, run):
    fire = hooks(build(mode="offline"))
    fire.run_started(run=run)
    fire.completed(run=run, result=None)
    (found,) = recorded(run.folder)
    config = {k: json.loads(v) for k, v in found.config.items() if k != "_wandb"}
    assert config == {**run.settings, "run_id": "r-1"}
    assert found.run.display_name == "first"


def test_every_option_reaches_the_client(build, hooks, recorded, run, tmp_path):
    fire = hooks(build(mode="offline", project="p", run_name="n", entity="team", tags=["a", "b"], group="g", notes="why",
                       dir=str(tmp_path / "there")))  # fmt: skip
    fire.run_started(run=run)
    fire.completed(run=run, result=None)
    (found,) = recorded(tmp_path / "there")
    told = found.run
    assert (told.project, told.display_name, told.entity) == ("p", "n", "team")
    assert (list(told.tags), told.run_group, told.notes) == (["a", "b"], "g", "why")
    assert not recorded(run.folder)


def test_what_is_not_given_comes_from_the_clients_environment(
    build, hooks, recorded, run, fresh, monkeypatch, tmp_path
):
    values = {"MODE": "offline", "PROJECT": "p", "ENTITY": "team", "RUN_GROUP": "g", "DIR": str(tmp_path / "there")}
    for name, value in values.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    fire = hooks(build())
    fire.run_started(run=run)
    fire.completed(run=run, result=None)
    (found,) = recorded(tmp_path / "there")
    assert (found.run.project, found.run.entity, found.run.run_group) == ("p", "team", "g")


def test_disabled_writes_nothing(build, hooks, run):
    fire = hooks(build(mode="disabled"))
    fire.run_started(run=run)
    with captured_logs() as lines:
        fire.logged(run=run, step=1, metrics={"loss": 3.0})
        fire.completed(run=run, result=None)
    assert lines == []
    assert not [p for p in run.folder.rglob("*") if p.is_file()]


def test_only_the_first_rank_records(build, hooks, run):
    callback = build(mode="offline")
    fire = hooks(callback)
    other = attrs.evolve(run, is_main=False)
    fire.run_started(run=other)
    fire.logged(run=other, step=1, metrics={"loss": 3.0})
    fire.evaluated(run=other, step=1, metrics={"eval_loss": 3.0})
    fire.completed(run=other, result=None)
    assert not run.folder.exists()
    assert callback.state() == {"wandb_id": None}


def test_a_resumed_run_goes_on_with_the_same_wandb_run(build, hooks, recorded, run):
    before = build(mode="offline")
    fire = hooks(before)
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    state = json.loads(json.dumps(before.state()))
    fire.stopped(run=run, step=1, reason="signal 15")
    after = build(mode="offline")
    after.load_state(state)
    fire = hooks(after)
    fire.resumed(run=run, step=1)
    fire.logged(run=run, step=2, metrics={"loss": 2.0})
    fire.completed(run=run, result=None)
    first, second = recorded(run.folder)
    assert first.run.run_id == second.run.run_id == state["wandb_id"]
    assert (list(first.rows), list(second.rows)) == ([1], [2])


def test_a_training_interrupted_without_an_event_can_be_resumed_in_the_same_process(build, hooks, recorded, run):
    before = build(mode="offline")
    fire = hooks(before)
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    after = build(mode="offline")
    after.load_state(before.state())
    fire = hooks(after)
    fire.resumed(run=run, step=1)
    fire.logged(run=run, step=2, metrics={"loss": 2.0})
    fire.completed(run=run, result=None)
    first, second = recorded(run.folder)
    assert (list(first.rows), first.exit_code) == ([1], 1)
    assert (list(second.rows), second.exit_code) == ([2], 0)


@pytest.mark.parametrize(
    ("end", "arguments", "status", "exit_code"),
    [
        ("completed", {"result": None}, "completed", 0),
        ("stopped", {"step": 1, "reason": "signal 15"}, "stopped: signal 15", 0),
        ("failed", {"error": ValueError("a secret")}, "failed: ValueError", 1),
    ],
)
def test_every_end_is_told_without_the_text_of_an_error(build, hooks, recorded, run, end, arguments, status, exit_code):
    fire = hooks(build(mode="offline"))
    fire.run_started(run=run)
    getattr(fire, end)(run=run, **arguments)
    (found,) = recorded(run.folder)
    assert json.loads(found.summary["status"]) == status
    assert found.exit_code == exit_code


def test_a_run_that_the_user_has_open_stays_open(build, hooks, recorded, run, tmp_path):
    import wandb

    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as own:
        fire = hooks(build(mode="offline"))
        fire.run_started(run=run)
        fire.completed(run=run, result=None)
        own.log({"mine": 1.0}, step=1)
        assert wandb.run is own
    assert recorded(tmp_path)[0].rows == {1: {"mine": 1.0}}
