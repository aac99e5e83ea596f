"""The callback `trackio` without an address, by what the library reads from its own store."""

import json
import math
import sqlite3

import attrs
import luthier
import pytest
from luthier.testing import captured_logs, expect_error
from luthier.testing.worlds import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{i} plus {j} is", "completion": str(i + j)} for i in range(3) for j in range(3)]


def test_every_number_stands_under_its_own_name_at_its_own_step(build, hooks, rows_of, run, project):
    callback = build(project=project)
    fire = hooks(callback)
    fire.run_started(run=run)
    fire.evaluated(run=run, step=0, metrics={"eval_loss": 4.0})
    fire.logged(run=run, step=2, metrics={"loss": 3.0, "seconds/data": 0.5, "skipped_steps": 0})
    fire.evaluated(run=run, step=2, metrics={"eval_loss": float("nan")})
    fire.completed(run=run, result=None)
    first, second, third = rows_of(project, callback.state()["trackio_id"])
    assert first == (0, {"eval_loss": 4.0})
    assert second == (2, {"loss": 3.0, "seconds/data": 0.5, "skipped_steps": 0})
    assert math.isnan(float(third[1]["eval_loss"]))


def test_the_recipe_is_the_config_and_the_run_has_its_name_and_group(build, hooks, run, project):
    import trackio

    fire = hooks(build(project=project, group="g", run_name="mine"))
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    fire.completed(run=run, result=None)
    (found,) = trackio.Api().runs(project)
    config = dict(found.config)
    assert found.name == "mine"
    assert config.pop("_Group") == "g"
    assert {name: value for name, value in config.items() if name[0] != "_"} == {**run.settings, "run_id": "r-1"}


def test_only_the_first_rank_records(build, hooks, run, project):
    import trackio

    callback = build(project=project)
    fire = hooks(callback)
    other = attrs.evolve(run, is_main=False)
    fire.run_started(run=other)
    fire.logged(run=other, step=1, metrics={"loss": 3.0})
    fire.completed(run=other, result=None)
    assert callback.state() == {"trackio_id": None}
    with pytest.raises(ValueError, match="does not exist"):
        trackio.Api().runs(project)


def test_a_resumed_run_goes_on_with_the_same_trackio_run_among_others_of_its_name(build, hooks, rows_of, run, project):
    import trackio

    before = build(project=project)
    fire = hooks(before)
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    state = json.loads(json.dumps(before.state()))
    fire.stopped(run=run, step=1, reason="signal 15")
    other = hooks(build(project=project))
    other.run_started(run=run)
    other.logged(run=run, step=1, metrics={"loss": 9.0})
    other.completed(run=run, result=None)
    after = build(project=project)
    after.load_state(state)
    fire = hooks(after)
    fire.resumed(run=run, step=1)
    fire.logged(run=run, step=2, metrics={"loss": 2.0})
    fire.completed(run=run, result=None)
    assert after.state() == state
    assert rows_of(project, state["trackio_id"]) == [(1, {"loss": 3.0}), (2, {"loss": 2.0})]
    assert [found.name for found in trackio.Api().runs(project)] == ["first", "first"]


@pytest.mark.parametrize(
    ("end", "arguments", "alert"),
    [
        ("stopped", {"step": 1, "reason": "signal 15"}, ("warn", "stopped", "signal 15")),
        ("failed", {"error": ValueError("a secret")}, ("error", "failed", "ValueError")),
    ],
)
def test_an_end_before_the_last_step_is_an_alert_without_the_text_of_an_error(
    build, hooks, run, project, capsys, end, arguments, alert
):
    import trackio

    fire = hooks(build(project=project))
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    capsys.readouterr()
    with captured_logs():
        getattr(fire, end)(run=run, **arguments)
    (found,) = trackio.Api().alerts(project)
    assert (found["level"], found["title"], found["text"], found["step"]) == (*alert, 1)
    assert capsys.readouterr().out == ""


def test_the_log_says_where_the_numbers_lie_and_nothing_of_an_upload(build, hooks, run, project):
    from trackio import utils

    with captured_logs() as lines:
        fire = hooks(build(project=project))
        fire.run_started(run=run)
        fire.logged(run=run, step=1, metrics={"loss": 3.0})
        fire.completed(run=run, result=None)
    told = [line for line in lines if line["level"] == "info"]
    assert [line["event"] for line in told] == ["tracker_opened", "tracker_closed"]
    assert {(line["address"], line["show"]) for line in told} == {
        (str(utils.TRACKIO_DIR), f"trackio show --project {project}")
    }
    assert "Uploading" not in str(lines)


def test_a_stored_token_is_not_sent_to_the_hub(build, hooks, run, project, monkeypatch):
    import httpx

    asked = []
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setattr(httpx.Client, "send", lambda self, request, **others: asked.append(request.url))
    fire = hooks(build(project=project))
    fire.run_started(run=run)
    fire.logged(run=run, step=1, metrics={"loss": 3.0})
    fire.completed(run=run, result=None)
    assert asked == []


def test_a_run_that_the_user_has_open_stays_open(build, hooks, run, project):
    import trackio
    from trackio import context_vars

    own = trackio.init(f"{project}-own", embed=False, auto_log_cpu=False, auto_log_gpu=False)
    fire = hooks(build(project=project))
    fire.run_started(run=run)
    fire.completed(run=run, result=None)
    assert context_vars.current_run.get() is own
    trackio.finish()


def test_a_store_that_cannot_be_written_is_an_error_before_the_first_step(build, hooks, run, project):
    from trackio.sqlite_storage import SQLiteStorage

    SQLiteStorage.get_project_db_path(project).mkdir(parents=True)
    with expect_error("part-unsupported", "callback 'trackio'") as caught:
        hooks(build(project=project)).run_started(run=run)
    assert "TRACKIO_DIR" in caught.value.remedy


def test_a_later_failure_is_logged_once_and_training_goes_on(build, hooks, run, project):
    from trackio.sqlite_storage import SQLiteStorage

    fire = hooks(build(project=project))
    fire.run_started(run=run)
    with sqlite3.connect(SQLiteStorage.get_project_db_path(project)) as store:
        store.execute("DROP TABLE metrics")
        store.execute("CREATE VIEW metrics AS SELECT 1 AS run_id")
    with captured_logs() as lines:
        fire.logged(run=run, step=1, metrics={"loss": 3.0})
        fire.completed(run=run, result=None)
        fire.logged(run=run, step=2, metrics={"loss": 2.0})
    (line,) = [line for line in lines if line["level"] != "debug"]
    assert (line["event"], line["level"]) == ("tracker_failed", "error")
    assert line["error"]


def test_report_to_trackio_records_a_training(rows_of, tmp_path):
    import trackio

    run = luthier.train(model=(tiny_model(), tiny_tokenizer()), data=ROWS, max_steps=2, global_batch_size=4, device="cpu",
                        report_to="trackio", output_dir=tmp_path / "reported")  # fmt: skip
    (found,) = [each for each in trackio.Api().runs("luthier") if each.config["run_id"] == run.run_id]
    lines = [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]
    rows = rows_of("luthier", found.id)
    assert found.name == "reported"
    assert [(step, row["loss"]) for step, row in rows if "loss" in row] == [
        (line["step"], line["loss"]) for line in lines if "loss" in line
    ]
