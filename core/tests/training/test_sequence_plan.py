"""The dry run of a sequence: what it says is what the sequence then does, and it writes nothing."""

import io
import json
from pathlib import Path

import attrs
import jsonschema
import luthier
import pytest
from luthier.cli.app import app
from luthier.cli.continual import draw_sequence_plan
from luthier.cli.documents.document_schemas import document_schema
from luthier.errors import LuthierError
from luthier.logs import set_up
from luthier.runs.writing.record import read_record
from luthier.training.continual.sequence_plan import SequencePlan, TaskPlan
from rich.console import Console
from typer.testing import CliRunner


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.fixture
def drawn():
    """Return the text of a plan on a wide screen."""

    def draw(planned):
        screen = Console(width=300, file=io.StringIO())
        draw_sequence_plan(screen, planned)
        return screen.file.getvalue()

    return draw


def test_a_dry_run_says_what_the_sequence_then_does_and_writes_nothing(recipe_file, tmp_path, drawn):
    before = sorted(tmp_path.rglob("*"))
    settings = {"save_steps": 1, "eval_steps": 2}
    planned = luthier.continual(recipe_file, dry_run=True, **settings)
    assert sorted(tmp_path.rglob("*")) == before
    heard = []

    class Listener:
        @luthier.event
        def evaluated(self):
            heard.append("evaluated")

    report = luthier.continual(recipe_file, **settings, exact_callbacks=["jsonl", Listener()])
    assert [task.state for task in planned.tasks] == ["new", "new"]
    assert [task.output_path for task in planned.tasks] == report.runs
    results = [read_record(run)["result"] for run in report.runs]
    assert [task.steps for task in planned.tasks] == [result["steps"] for result in results] == [3, 2]
    assert planned.tasks[0].tokens == results[0]["tokens_seen"]
    assert sum(task.evaluations for task in planned.tasks) == len(heard)
    for task, run in zip(planned.tasks, report.runs, strict=True):
        assert task.disk["total"] == pytest.approx(folder_bytes(run), rel=0.1)
    assert [name for name in ("first", "second", "new", "about") if name not in drawn(planned)] == []


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "slao", "osft"])
def test_the_disk_of_each_task_is_predicted(recipe_file, adapter):
    planned = luthier.continual(recipe_file, dry_run=True, adapter=adapter, merge=True)
    report = luthier.continual(recipe_file, adapter=adapter, merge=True, eval_base=False)
    for task, run in zip(planned.tasks, report.runs, strict=True):
        assert task.disk["total"] == pytest.approx(folder_bytes(run), rel=0.15)


def task_plan(name, **changes):
    numbers = {"steps": 10, "tokens": 100, "evaluations": 2, "validation_examples": 5, "seconds": 1.5, "epochs": 1.0}
    sizes = {"memory": {"total": 7}, "disk": {"total": 9}, "examples": 3, "peak_learning_rate": 0.1, "fits": True}
    given = {**numbers, **sizes, "state": "new", "data": [], "warnings": [], "output_path": Path(name), **changes}
    return TaskPlan(name=name, **given)


def test_the_sums_of_a_plan_are_those_of_its_tasks_and_unknown_where_one_is():
    tasks = [task_plan("a"), task_plan("b", steps=1, memory={"total": 8}, validation_examples=2)]
    planned = SequencePlan(output_path=Path("out"), method="lora", base_evaluated=False, tasks=tasks)
    assert planned.total == {
        "steps": 11, "tokens": 200, "seconds": 3.0, "memory": 8, "disk": 18,
        "evaluations": 2 + 2 + 2 * 2,  # in each task, and both after each
        "evaluated_rows": 2 * 5 + 2 * 2 + 2 * (5 + 2),
    }  # fmt: skip
    endless = attrs.evolve(planned, base_evaluated=True, tasks=[*tasks, task_plan("c", steps=None, evaluations=None)])
    assert (endless.total["steps"], endless.total["evaluations"], endless.total["tokens"]) == (None, None, 300)


def test_the_command_prints_the_plan_as_json(recipe_file, tmp_path):
    done = CliRunner().invoke(app, ["continual", str(recipe_file), "--dry-run", "--json"])
    set_up("warning")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [task["name"] for task in document["tasks"]] == ["first", "second"]
    assert jsonschema.Draft202012Validator(document_schema("continual")).is_valid(document)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def sliced(task_files, tmp_path):
    """Two runs of one step, cut from a file."""
    return {
        "model": "demo", "data": {"train": [str(task_files["first"])], "validation": 0.25}, "num_runs": 2,
        "samples_per_run": 4, "steps_per_run": 1, "global_batch_size": 2, "exact_callbacks": [],
        "memory_check": False, "eval_base": False, "output_dir": tmp_path / "out",
    }  # fmt: skip


def test_a_dry_run_cuts_a_data_set_and_leaves_no_slice(sliced, tmp_path):
    planned = luthier.continual(sliced, dry_run=True)
    assert [(task.name, task.examples, task.steps) for task in planned.tasks] == [("run-00", 3, 1), ("run-01", 3, 1)]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_knows_a_finished_sequence_and_its_place_beside_it(sliced, tmp_path, drawn):
    luthier.continual(sliced)
    planned = luthier.continual(sliced, dry_run=True)
    assert [task.state for task in planned.tasks] == ["completed"] * 2
    assert "completed" in drawn(planned)
    fresh = luthier.continual(sliced, dry_run=True, fresh=True)
    assert (fresh.output_path, fresh.tasks[0].state) == (tmp_path / "out-2", "new")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"adapter": {"name": "lora", "target_modules": ["nothing"]}}, "model-target"),
        ({"data.validation": 0.0}, "data-empty"),
        ({"tasks": [{"name": "a", "data": "first.jsonl"}, {"name": "b", "data": "missing.jsonl"}]}, "data-not-found"),
    ],
)
def test_a_dry_run_refuses_what_the_sequence_would_refuse(recipe_file, tmp_path, changes, code):
    with pytest.raises(LuthierError) as caught:
        luthier.continual(recipe_file, dry_run=True, **changes)
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()
