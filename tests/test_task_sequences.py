"""Sequences of two tasks: what the first decides holds for both, and two ranks train what one does."""

import json
from pathlib import Path

import luthier
import pytest
import torch
from luthier.runs.writing.record import read_record
from luthier.testing.ranks import in_ranks
from safetensors.torch import load_file

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
