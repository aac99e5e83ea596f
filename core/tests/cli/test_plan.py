"""`luthier plan`: what a run would be, and what can be said of it without torch."""

import json
from pathlib import Path

import pytest


def test_plan_in_a_process_of_its_own_prints_one_document(command, tiny, trained):
    result = command("plan", tiny / "r.yaml", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {"recipe", "parts", "compatibility", "parameters", "memory", "schedule", "packing"} <= found.keys()
    counts = found["parameters"]["all"]
    assert 0 < counts["trainable"] <= counts["total"]
    assert found["memory"]["total"] == sum(v for k, v in found["memory"].items() if k != "total")
    assert 0 < found["packing"]["efficiency"] <= 1
    assert found["schedule"]["total_steps"] == 3
    run, _ = trained
    lines = (Path(run["output_path"]) / "metrics.jsonl").read_text().splitlines()
    resident = max(json.loads(line).get("peak_memory", 0) for line in lines)  # what a system monitor shows of a run
    assert found["device"]["process"] + found["memory"]["total"] == pytest.approx(resident, rel=0.25)


def test_the_plan_is_readable_at_eighty_columns(luthier, tiny, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = luthier("plan", tiny / "r.yaml")
    assert result.status == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    for title in (
        "Run",
        "Parts",
        "Parameters",
        "Weights of the base that no adapter reaches",
        "Memory at the peak",
        "Steps",
    ):
        assert title in lines
    for text in ("adamw", "luthier 0.1.0", "trainable", "gradients", "steps per epoch", "packing", "full"):
        assert text in result.stdout


def test_the_plan_says_who_gives_what_a_part_needs(luthier, tiny):
    parts = luthier("plan", tiny / "r.yaml", "--adapter", "full", "--json").document["compatibility"]
    adapter = next(part for part in parts if part["kind"] == "adapter")
    assert adapter["needs"] == {"dense-weights": "quantizer 'none'"}


def test_parts_that_do_not_go_together_are_refused_with_both_names(luthier, tiny, distribute, offering):
    source = offering("picky").replace("options=Options", "options=Options, needs='picky:thing'")
    distribute("luthier-picky", source)
    error = luthier("plan", tiny / "r.yaml", "--optimizer", "picky", "--json").document["error"]
    assert error["code"] == "part-incompatible"
    assert "optimizer 'picky' needs picky:thing" in error["problem"]


def test_without_torch_the_parts_are_checked_and_the_rest_is_said_to_need_it(bare, tiny):
    result = bare("plan", tiny / "r.yaml", "--adapter", "full", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [p["name"] for p in found["parts"]][:3] == ["full", "sft", "adamw"]
    assert "torch" in found["not_planned"]["problem"]
    assert 'pip install "luthier[local]"' in found["not_planned"]["remedy"]
    text = bare("plan", tiny / "r.yaml", "--adapter", "full").stdout
    assert "adamw" in text
    assert 'pip install "luthier[local]"' in text


def test_without_torch_a_part_that_is_not_installed_is_still_named(bare, tiny):
    result = bare("plan", tiny / "r.yaml")
    assert result.returncode == 2
    assert "part-unknown" in result.stderr
    assert "adapter 'lora'" in result.stderr


def test_without_torch_a_wrong_recipe_is_still_an_error(bare, tiny):
    result = bare("plan", tiny / "r.yaml", "--adapter", "full", "--learning-rate", "fast")
    assert result.returncode == 2
    assert "recipe-wrong-type" in result.stderr
    assert "Traceback" not in result.stderr
