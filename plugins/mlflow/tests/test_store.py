"""The callback `mlflow` with a local store, by what MLflow reads back from it."""

import json
import math
import shutil
import sqlite3
from contextlib import closing

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.runs.writing.active_run import ActiveRun
from luthier.testing import captured_logs
from luthier_mlflow.tracker import flat
from mlflow.entities import Param

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")  # between MLflow and SQLAlchemy
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


@settings(max_examples=5, deadline=None)
@given(st.lists(METRICS, min_size=1, max_size=5))
def test_every_number_is_recorded_under_its_own_name_at_its_own_step(
    tmp_path_factory, build, hooks, store, recorded, lines
):
    run = ActiveRun(run_id="r", folder=tmp_path_factory.mktemp("run"), name="n", settings={}, total_steps=len(lines))
    callback = build(tracking_uri=store)
    fire = hooks(callback)
    fire.run_started(run=run)
    for step, metrics in enumerate(lines, 1):
        fire.logged(run=run, step=step, metrics=metrics)
    fire.completed(run=run, result=None)
    expected = {(name, step): value for step, line in enumerate(lines, 1) for name, value in line.items()}
    assert recorded(callback).points == expected


def test_an_evaluation_is_recorded_at_its_step(build, hooks, store, recorded, run):
    callback = build(tracking_uri=store)
    fire = hooks(callback)
    fire.run_started(run=run)
    fire.evaluated(run=run, step=0, metrics={"eval_loss": 4.0})
    fire.logged(run=run, step=2, metrics={"loss": 3.0})
    fire.evaluated(run=run, step=2, metrics={"eval_loss": float("nan")})
    fire.completed(run=run, result=None)
    points = recorded(callback).points
    assert math.isnan(points.pop(("eval_loss", 2)))
    assert points == {("eval_loss", 0): 4.0, ("loss", 2): 3.0}


def test_the_recipe_is_the_parameters_and_the_run_has_its_name_and_id(build, hooks, store, recorded, run):
    callback = build(tracking_uri=store)
    fire = hooks(callback)
    fire.run_started(run=run)
    fire.completed(run=run, result=None)
    found = recorded(callback)
    assert found.params == {"adapter.name": "lora", "adapter.r": "16", "learning_rate": "0.0002",
                            "exact_callbacks": '["jsonl"]', "merge": "none"}  # fmt: skip
    assert (found.name, found.tags["luthier.run_id"], found.experiment) == ("first", "r-1", "Default")


def test_a_recipe_of_more_parameters_than_one_request_takes_is_recorded_whole(build, hooks, store, recorded, run):
    callback = build(tracking_uri=store)
    many = {f"option_{i}": i for i in range(250)}
    fire = hooks(callback)
    fire.run_started(run=attrs.evolve(run, settings=many))
    fire.completed(run=run, result=None)
    assert recorded(callback).params == {name: str(value) for name, value in many.items()}


def test_names_that_mlflow_refuses_are_spelt_with_underscores():
    settings = {"columns": {"a/b.c:ü?": "answer"}, "empty": {}, "on": True}
    told = {p.key: p.value for p in flat(settings) if isinstance(p, Param)}
    assert told == {"columns.a_b_c_ü_": "answer", "empty": "{}", "on": "true"}


def test_every_option_reaches_the_store(build, hooks, store, recorded, run):
    callback = build(tracking_uri=store, experiment_name="mine", run_name="n", tags={"team": "search"})
    fire = hooks(callback)
    fire.run_started(run=run)
    fire.completed(run=run, result=None)
    found = recorded(callback)
    assert (found.experiment, found.name, found.tags["team"]) == ("mine", "n", "search")


def test_two_runs_share_an_experiment(build, hooks, store, recorded, run):
    found = []
    for _ in range(2):
        callback = build(tracking_uri=store, experiment_name="shared")
        hooks(callback).run_started(run=run)
        found.append(recorded(callback))
    first, second = found
    assert first.run.info.experiment_id == second.run.info.experiment_id
    assert first.run.info.run_id != second.run.info.run_id


def test_what_is_not_given_comes_from_the_clients_environment(build, hooks, store, recorded, run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    callback = build()
    hooks(callback).run_started(run=run)
    assert recorded(callback).experiment == "of the environment"


def test_without_an_address_the_store_is_in_the_run_folder(build, hooks, recorded, run, tmp_path):
    callback = build()
    assert not run.folder.exists()  # nothing is made before the run starts
    fire = hooks(callback)
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    fire.completed(run=run, result=None)
    assert recorded(callback, f"sqlite:///{run.folder}/mlflow.db").points == {("loss", 1): 3.0}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_only_the_first_rank_records(build, hooks, run):
    callback = build()
    fire = hooks(callback)
    other = attrs.evolve(run, is_main=False)
    fire.run_started(run=other)
    fire.logged(run=other, step=1, metrics={"loss": 3.0})
    fire.completed(run=other, result=None)
    assert not run.folder.exists()
    assert callback.state() == {"mlflow_id": None}


def test_a_resumed_run_goes_on_with_the_same_mlflow_run(build, hooks, store, recorded, run):
    before = build(tracking_uri=store)
    fire = hooks(before)
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    state = json.loads(json.dumps(before.state()))
    fire.stopped(run=run, step=1, reason="signal 15")
    assert recorded(before).status == "KILLED"
    after = build(tracking_uri=store)
    after.load_state(state)
    fire = hooks(after)
    fire.resumed(run=run, step=1)
    assert recorded(before).status == "RUNNING"
    fire.logged(run=run, step=2, metrics={"loss": 2.0})
    fire.completed(run=run, result=None)
    found = recorded(before)
    assert found.points == {("loss", 1): 3.0, ("loss", 2): 2.0}
    assert found.status == "FINISHED"


def test_a_resumed_run_that_the_store_has_lost_begins_a_new_one_and_says_so(build, hooks, store, recorded, run):
    callback = build(tracking_uri=store)
    callback.load_state({"mlflow_id": "0" * 32})
    with captured_logs() as lines:
        hooks(callback).resumed(run=run, step=4)
    assert [line["event"] for line in lines] == ["tracker_run_missing", "tracker_opened"]
    assert recorded(callback).params["adapter.r"] == "16"


@pytest.mark.parametrize(
    ("end", "arguments", "status", "words"),
    [
        ("completed", {"result": None}, "FINISHED", "completed"),
        ("stopped", {"step": 1, "reason": "signal 15"}, "KILLED", "stopped: signal 15"),
        ("failed", {"error": LuthierError("train-nonfinite", "a secret")}, "FAILED", "failed: train-nonfinite"),
        ("failed", {"error": ValueError("a secret")}, "FAILED", "failed: ValueError"),
    ],
)
def test_every_end_is_told_without_the_text_of_an_error(
    build, hooks, store, recorded, run, end, arguments, status, words
):
    callback = build(tracking_uri=store)
    fire = hooks(callback)
    fire.run_started(run=run)
    getattr(fire, end)(run=run, **arguments)
    found = recorded(callback)
    assert (found.status, found.tags["luthier.status"]) == (status, words)


def test_an_early_stopped_run_is_finished(build, hooks, store, recorded, run):
    callback = build(tracking_uri=store)
    fire = hooks(callback)
    fire.run_started(run=run)
    fire.stopped(run=run, step=1, reason="eval_loss has not improved")
    fire.completed(run=run, result=None)
    assert recorded(callback).status == "FINISHED"


def test_a_store_that_breaks_is_said_once_and_training_goes_on(build, hooks, store, run, tmp_path):
    hooks(build(tracking_uri=store)).run_started(run=run)
    copy = shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "copy.db")
    fire = hooks(build(tracking_uri=f"sqlite:///{copy}"))
    fire.run_started(run=run)
    with closing(sqlite3.connect(copy)) as database:
        database.execute("DROP TABLE metrics")
    with captured_logs() as lines:
        for step in range(1, 9):
            fire.logged(run=run, step=step, metrics={"loss": 3.0})
        fire.completed(run=run, result=None)
    (line,) = lines
    assert (line["event"], line["tracker"], line["during"], line["level"]) == (
        "tracker_failed", "mlflow", "logged", "error")  # fmt: skip
    assert "metrics" in line["error"]
