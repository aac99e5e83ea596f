"""Continual training: tasks one after the other, each begun from what the last has left, all evaluated after each."""

import io
import json

import jsonschema
import luthier
import pytest
import torch
from luthier.cli.app import app
from luthier.cli.continual import draw_report
from luthier.cli.documents.document_schemas import document_schema
from luthier.errors import LuthierError
from luthier.logs import set_up
from luthier.recipe.reading.yaml12 import load_yaml
from luthier.state_tree import load_state
from luthier.training.continual.forgetting_report import LEGEND, TaskReport, format_table
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner


def weights(folder):
    (path,) = (folder / "model").glob("*.safetensors")
    return load_file(path)


def test_two_tasks_are_trained_and_evaluated_after_each(recipe_file, tmp_path):
    report = luthier.continual(recipe_file)
    assert report.tasks == ["first", "second"]
    assert [len(row) for row in report.metrics["eval_loss"]] == [2, 2]
    assert len(report.base["eval_loss"]) == 2
    assert report.metrics["eval_loss"][0][0] < report.base["eval_loss"][0]
    written = json.loads((tmp_path / "out/continual.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert (tmp_path / "out/continual.png").read_bytes().startswith(b"\x89PNG")
    assert "| second |" in (tmp_path / "out/continual.md").read_text()


def test_a_task_begins_where_the_one_before_ended(recipe_file, tmp_path):
    luthier.continual(recipe_file, learning_rate=0.0)
    first, second = (weights(tmp_path / "out" / name) for name in ("task-00-first", "task-01-second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    luthier.continual(recipe_file, output_dir=tmp_path / "moved")
    state = load_state(tmp_path / "moved/task-00-first/task-state")["adapter"]
    moved = weights(tmp_path / "moved/task-00-first")
    assert any(not torch.equal(first[name], moved[name]) for name in moved)
    assert state.keys() >= {"model.embed_tokens.weight"}


def test_a_sequence_that_was_cut_off_ends_with_the_same_report(recipe_file, tmp_path):
    class Halt:
        @luthier.event
        def task_started(self, task):
            if task == 1:
                raise KeyboardInterrupt

    straight = luthier.continual(recipe_file, output_dir=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        luthier.continual(recipe_file, output_dir=tmp_path / "cut", exact_callbacks=["jsonl", Halt()])
    resumed = luthier.continual(recipe_file, output_dir=tmp_path / "cut")
    assert resumed.metrics == straight.metrics and resumed.base == straight.base


def test_one_data_set_is_cut_into_runs_without_overlap(task_files, tmp_path):
    report = luthier.multi_run(
        {"model": "demo", "data": {"train": [str(task_files["first"])], "validation": 0.25}, "memory_check": False},
        num_runs=2, steps_per_run=1, samples_per_run=5, output_dir=tmp_path / "out", exact_callbacks=[], global_batch_size=2,
    )  # fmt: skip
    assert report.tasks == ["run-00", "run-01"]
    files = sorted((tmp_path / "out/data").iterdir())
    rows = [line for file in files for line in file.read_text().splitlines()]
    assert len(rows) == 10 == len(set(rows))


def test_the_command_prints_the_report_as_json(recipe_file):
    done = CliRunner().invoke(app, ["continual", str(recipe_file), "--set", "max_steps=1", "--json"])
    set_up("warning")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["tasks"] == ["first", "second"]
    assert jsonschema.Draft202012Validator(document_schema("continual")).is_valid(document)


def test_the_screen_and_the_table_explain_the_measures_and_have_none_of_a_perplexity(tmp_path):
    rows = {"eval_loss": [[1.0, 6.5], [2.0, 0.5]], "eval_perplexity": [[2.7, 665.1], [7.4, 1.6]]}
    report = TaskReport(
        output_path=tmp_path, tasks=["a", "b"], runs=[], metrics=rows, base=None, seconds=[], method="x"
    )
    screen = Console(width=4000, file=io.StringIO())
    draw_report(screen, report)
    for text in (screen.file.getvalue(), format_table(report)):
        assert LEGEND in text
        assert "backward" in text.replace(LEGEND, "") and "-1.0000" in text  # the loss has its measures
        assert "4.7000" not in text and "4.5000" not in text  # forgetting and average of the perplexity
    assert report.to_dict()["transfer"]["eval_perplexity"]["forgetting"] == pytest.approx(4.7)


def test_one_data_set_is_cut_into_runs_by_flags_alone(task_files, tmp_path):
    flags = ["--data", str(task_files["first"]), "--data.validation", "0.25", "--num-runs", "2",
             "--steps-per-run", "1", "--samples-per-run", "4", "--global-batch-size", "2", "--merge-mode", "lora",
             "--memory-check", "false", "--output-dir", str(tmp_path / "out"), "--json"]  # fmt: skip
    done = CliRunner().invoke(app, ["continual", *flags])
    set_up("warning")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tasks"] == ["run-00", "run-01"]
    assert json.loads((tmp_path / "out/task-01-run-01/adapter/luthier.json").read_text())["adapter"]["name"] == "lora"
    assert "the embedded model is trained" in done.stderr
    assert (
        load_yaml((tmp_path / "out/task-01-run-01/recipe.yaml").read_text(), "recipe")[0]["model"]["name_or_path"]
        == "demo"
    )


def test_a_recipe_without_a_model_is_refused_and_a_flag_wins_over_the_embedded_one(task_files, tmp_path):
    rows = {"data": {"train": [str(task_files["first"])], "validation": 0.25}, "num_runs": 2}
    with pytest.raises(LuthierError) as refused:
        luthier.continual(rows, output_dir=tmp_path / "out", dry_run=True)
    assert (refused.value.code, refused.value.where) == ("recipe-missing", "model")
    with pytest.raises(LuthierError, match="nowhere"):
        luthier.multi_run(**rows, model=str(tmp_path / "nowhere"), output_dir=tmp_path / "out")


@pytest.mark.parametrize(("given", "held_out"), [({}, 2), ({"data.validation": 0.25}, 5)])
def test_runs_of_one_data_set_hold_out_a_tenth_of_their_rows_unless_told_otherwise(tmp_path, given, held_out):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} and", "completion": str(i)}) + "\n" for i in range(40)))
    plan = luthier.continual(
        {"model": "demo", "data": str(rows), "num_runs": 2, "max_steps": 1, "memory_check": False},
        output_dir=tmp_path / "out", dry_run=True, **given,
    )  # fmt: skip
    assert [task.validation_examples for task in plan.tasks] == [held_out] * 2


def test_what_all_tasks_need_may_come_from_flags(recipe_file):
    tree = load_yaml(recipe_file.read_text(), "recipe")[0]
    recipe_file.write_text(json.dumps({name: value for name, value in tree.items() if name != "model"}))
    done = CliRunner().invoke(app, ["continual", str(recipe_file), "--model", "demo", "--max-steps", "1", "--json"])
    set_up("warning")
    assert (done.exit_code, json.loads(done.stdout)["tasks"]) == (0, ["first", "second"])


@pytest.mark.parametrize(
    ("changes", "code", "where"),
    [
        ({"tasks": []}, "recipe-missing", "tasks"),
        ({"tasks": [{"name": "a", "data": "x.jsonl"}] * 2}, "recipe-conflict", "tasks.1.name"),
        ({"tasks": [{"data": "x.jsonl"}]}, "recipe-wrong-type", "tasks.0.name"),
        ({"tasks": [{"name": "a"}]}, "recipe-missing", "tasks.0.data"),
        ({"tasks": [{"name": "a", "data": "x", "output_dir": "y"}]}, "recipe-conflict", "tasks.0.output_dir"),
        (
            {"tasks": [{"name": "a", "data": "x"}, {"name": "b", "data": "x", "model": "y"}]},
            "recipe-conflict",
            "tasks.1.model.name_or_path",
        ),
        ({"steps_per_run": 3}, "recipe-conflict", "steps_per_run"),
    ],
)
def test_a_sequence_that_cannot_be_is_refused_before_anything_is_written(recipe_file, tmp_path, changes, code, where):
    with pytest.raises(LuthierError) as caught:
        luthier.continual(recipe_file, output_dir=tmp_path / "none", **changes)
    assert (caught.value.code, caught.value.where) == (code, where)
    assert not (tmp_path / "none").exists()


def test_a_task_without_held_out_rows_is_refused(recipe_file, tmp_path):
    with pytest.raises(LuthierError) as caught:
        luthier.continual(recipe_file, output_dir=tmp_path / "none", **{"data.validation": 0.0})
    assert (caught.value.code, caught.value.where) == ("data-empty", "data.validation")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("verb", ["train", "plan", "inspect"])
def test_a_verb_of_one_run_names_the_verb_of_sequences_in_its_only_error(recipe_file, verb):
    done = CliRunner().invoke(app, [verb, str(recipe_file), "--json"])
    set_up("warning")
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["where"]) == ("recipe-unknown-option", f"{recipe_file}:10: tasks")
    assert "luthier continual" in error["remedy"] and not error.get("errors")


def test_fresh_begins_beside_a_finished_sequence_which_stays_as_it_is(recipe_file, tmp_path):
    old = luthier.continual(recipe_file, max_steps=1, eval_base=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    command = ["continual", str(recipe_file), "--max-steps", "2", "--no-eval-base", "--json"]
    refused = CliRunner().invoke(app, command)
    done = CliRunner().invoke(app, [*command, "--fresh"])
    set_up("warning")
    error = json.loads(refused.stdout)["error"]
    assert error["code"] == "run-folder-other" and "--fresh" in error["remedy"]
    new = json.loads(done.stdout)
    assert (old.output_path, new["output_path"]) == (tmp_path / "out", str(tmp_path / "out-2"))
    assert [str(tmp_path / "out-2/task-00-first"), str(tmp_path / "out-2/task-01-second")] == new["runs"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(
    ("adapter", "code"),
    [
        ({"name": "lora", "target_modules": ["nothing"]}, "model-target"),
        ({"name": "osft", "unfreeze_rank_ratio": 0}, "train-nothing"),
    ],
)
def test_a_refused_adapter_leaves_no_folder(recipe_file, task_files, tmp_path, adapter, code, sliced):
    rows = {"tasks": [], "num_runs": 2, "data.train": str(task_files["first"])} if sliced else {}
    with pytest.raises(LuthierError) as caught:
        luthier.continual(recipe_file, output_dir=tmp_path / "none", adapter=adapter, **rows)
    assert caught.value.code == code
    assert not (tmp_path / "none").exists()


def test_a_refused_row_of_a_sliced_file_is_named_at_its_own_place_and_leaves_no_folder(tmp_path, task_files):
    path = task_files["first"]
    path.write_text(path.read_text() + '{"question": "a", "reply": "b"}\n')
    with pytest.raises(LuthierError) as caught:
        luthier.multi_run(model="demo", data={"train": [str(path)], "validation": 0.25}, num_runs=1,
                          output_dir=tmp_path / "none")  # fmt: skip
    assert (caught.value.code, caught.value.where) == ("data-format", str(path))
    assert f"{path}:13" in caught.value.problem
    assert not (tmp_path / "none").exists()


def test_a_refused_part_of_a_later_task_is_told_before_the_first_one_trains(recipe_file, tmp_path):
    tasks = [{"name": "a", "data": "first.jsonl"}, {"name": "b", "data": "second.jsonl", "max_steps": 0}]
    with pytest.raises(LuthierError):
        luthier.continual(recipe_file, tasks=tasks, output_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()
