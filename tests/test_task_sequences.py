"""Sequences of two tasks: what the first decides holds for both, and two ranks train what one does."""

import contextlib
import json
import os
from pathlib import Path

import luthier
import pytest
import torch
from luthier.cli.app import app
from luthier.runs.writing.record import read_record
from luthier.testing.ranks import in_ranks
from safetensors.torch import load_file
from typer.testing import CliRunner

ANSWERS = {"one": ("1", "2", "3"), "two": ("no", "yes", "maybe")}
DECIDED = {
    "lora": {"name": "lora", "r": 4, "rank_budget": 1500, "rank_gradient": 1, "target_modules": "all-linear"},
    "osft": {"name": "osft", "rank_rule": "importance", "calibration_batches": 1},
}


@pytest.fixture
def sequence(model_folder, tmp_path):
    """Two tasks of a few rows on the tiny Llama."""
    for name, answers in ANSWERS.items():
        rows = [{"prompt": f"{i} and {i % 4}?", "completion": answers[i % 3]} for i in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(model_folder),
        "tasks": [{"name": name, "data": str(tmp_path / f"{name}.jsonl")} for name in ANSWERS],
        "data": {"validation": 0.25},
        "eval_base": False,
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "num_threads": 1,
        "memory_check": False,
    }


def part_decisions(run):
    decisions = read_record(run)["decisions"]
    return {name: decision["value"] for name, decision in decisions.items() if name.startswith("part:")}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECIDED)
def test_ranks_that_the_first_task_chose_by_its_rows_hold_for_both_and_open(sequence, tmp_path, name):
    alone = luthier.train(
        {field: value for field, value in sequence.items() if field not in ("tasks", "eval_base")},
        data={"train": sequence["tasks"][1]["data"], "validation": 0.25},
        adapter=DECIDED[name],
        output_dir=tmp_path / "alone",
    )
    report = luthier.continual(sequence, adapter=DECIDED[name], output_dir=tmp_path / "both")
    first, second = (part_decisions(run) for run in report.runs)
    assert first == second != part_decisions(alone.output_path)
    assert luthier.generate(report.runs[1], "3 and", max_new_tokens=2) is not None


def in_turn(settings):
    return [str(run) for run in luthier.continual(settings).runs]


SHARDED = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": 4, "lora_dropout": 0.0, "init_lora_weights": "pissa"},
    "slao": {"name": "slao", "r": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_two_sharded_ranks_train_both_tasks_as_one_process_does(sequence, model_folder, tmp_path, name):
    exact = {"model": {"name_or_path": str(model_folder), "dtype": "float64"}, "adapter": SHARDED[name]}
    settings = {**sequence, **exact, "merge": name != "full"}
    alone = luthier.continual(settings, output_dir=tmp_path / "alone")
    (one, other) = in_ranks(2, in_turn, {**settings, "distributed": "fsdp", "output_dir": str(tmp_path / "ranks")})
    assert one == other
    for run, sharded in zip(alone.runs, map(Path, one), strict=True):
        losses = [read_record(path)["result"]["loss_history"] for path in (run, sharded)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        folder = "model" if name == "full" else "merged"
        weights, others = (load_file(path / folder / "model.safetensors") for path in (run, sharded))
        assert all(torch.allclose(weights[key], others[key], atol=1e-9) for key in weights)


class Counter:
    """A callback of the caller's own program, which no file can name."""

    def __init__(self):
        self.steps = 0

    @luthier.event
    def step_ended(self):
        self.steps += 1


def counted_in_turn(settings, folder):
    counter = Counter()
    with (folder / f"said-{os.environ['RANK']}").open("w") as said, contextlib.redirect_stderr(said):
        report = luthier.continual(settings, exact_callbacks=["jsonl", counter], output_dir=folder / "ranks")
        counts = [counter.steps, luthier.train(**later_task(settings, counter, report)).evaluate()["eval_loss"]]
    return [*counts, *report.metrics["eval_loss"][1]]


def later_task(settings, counter, report):
    """The arguments of a plain run by the same callback that goes on where the sequence has ended."""
    own = {name: value for name, value in settings.items() if name not in ("tasks", "eval_base", "data")}
    rows = {"train": settings["tasks"][1]["data"], "validation": 0.25}
    folder = report.output_path.with_name("plain")
    return {**own, "data": rows, "exact_callbacks": [counter], "output_dir": folder}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_callback_object_hears_both_tasks_on_two_ranks_and_nothing_is_warned_of(
    sequence, model_folder, tmp_path, strategy
):
    exact = {"model": {"name_or_path": str(model_folder), "dtype": "float64"}, "adapter": SHARDED["lora"]}
    settings = {**sequence, **exact, "distributed": strategy}
    (one, other) = in_ranks(2, counted_in_turn, settings, tmp_path)
    assert (one[0], other[0]) == (6, 0)  # rank 0 hears three steps of each task
    assert one[1:] == other[1:]
    alone = luthier.continual({**settings, "distributed": "auto"}, output_dir=tmp_path / "alone")
    assert one[2:] == pytest.approx(alone.metrics["eval_loss"][1], rel=1e-6)  # files of float32
    assert "not as when the run began" not in (tmp_path / "said-0").read_text()


@pytest.mark.slow
def test_of_two_ranks_one_prints_the_report(sequence, tmp_path):
    path = tmp_path / "sequence.json"
    path.write_text(json.dumps({**sequence, "max_steps": 1, "output_dir": "out"}))

    def command():
        done = CliRunner().invoke(app, ["continual", str(path), "--log-level", "error", "--json"])
        return [done.exit_code, done.stdout]

    (main, other) = in_ranks(2, command)
    assert (main[0], other) == (0, [0, ""])
    assert json.loads(main[1])["tasks"] == ["one", "two"]
