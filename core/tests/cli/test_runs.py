"""`luthier runs`: the list, one run, two side by side, one again; and the trial on one batch."""

import json
import shutil
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def runs(tiny, trained, tmp_path_factory):
    """A directory with the run that `luthier train` made, a killed one and a damaged one."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny / "run", folder / "first")
    shutil.copytree(tiny / "run", folder / "second")
    record = json.loads((folder / "second" / "run.json").read_text())
    record |= {"run_id": "20990101-000000-beef", "state": "running"}
    (folder / "second" / "run.json").write_text(json.dumps(record))
    (folder / "broken").mkdir()
    (folder / "broken" / "run.json").write_text('{"run_id":')
    return folder


def test_the_list_has_a_line_for_each_run(luthier, runs, trained):
    result = luthier("runs", "--dir", runs)
    assert result.status == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][:3] == ["id", "name", "state"]
    assert lines[1][:3] == ["20990101-000000-beef", "second", "killed"]
    assert lines[2][:3] == [trained[0]["run_id"], "first", "completed"]
    assert lines[3][:3] == ["-", "broken", "damaged"]
    assert {"llama", "lora", "3"} <= set(lines[2])
    assert "run.json cannot be read" in result.stdout


def test_the_list_as_json_holds_the_same(luthier, runs, trained):
    found = luthier("runs", "--dir", runs, "--json").document["runs"]
    assert [run["state"] for run in found] == ["killed", "completed", "damaged"]
    assert found[1]["loss"] == trained[0]["final_loss"]
    assert found[1]["eval_loss"] == pytest.approx(trained[0]["eval_loss"])
    assert (found[1]["step"], found[1]["total_steps"]) == (3, 3)


def test_without_any_run_there_is_an_empty_list_and_a_directory_that_is_not_there_is_told(
    luthier, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert luthier("runs", "--json").document == {"runs": []}
    assert "no runs in runs" in luthier("runs").stdout
    missing = luthier("runs", "--dir", "nowhere", "--json")
    assert (missing.status, missing.document["error"]["code"]) == (2, "run-not-found")


def test_show_tells_settings_parts_numbers_checkpoints_health_and_files(luthier, runs, trained):
    result = luthier("runs", "show", "first", "--dir", runs)
    assert result.status == 0
    for text in ("completed", "llama", "max_steps", "luthier-lora", "grad_norm", "step-00000003", "metrics.jsonl"):
        assert text in result.stdout, text
    found = luthier("runs", "show", trained[0]["run_id"][:18], "--dir", runs, "--json").document
    assert found["settings"]["max_steps"] == 3
    assert found["health"] == {"skipped_steps": 0, "loss_spikes": 0, "remarks": []}
    assert [c["finished"] for c in found["checkpoints"]] == [True]
    assert found["metrics"]["loss"]["first"] == trained[0]["loss_history"][0]


def test_show_tells_what_is_left_of_a_damaged_run(luthier, runs):
    result = luthier("runs", "show", runs / "broken")
    assert result.status == 0
    assert "damaged: run.json cannot be read" in " ".join(result.stdout.split())


def test_the_option_stands_before_the_verb_or_behind_it(luthier, runs):
    behind = luthier("runs", "show", "first", "--dir", runs, "--json").document
    before = luthier("runs", "--dir", runs, "show", "first", "--json").document
    assert {**behind, "age": 0} == {**before, "age": 0}


def test_a_name_that_may_be_several_is_an_error_that_lists_them(luthier, runs):
    result = luthier("runs", "show", "2", "--dir", runs)
    assert result.status == 2
    assert "first" in result.stderr and "second" in result.stderr


def test_diff_draws_both_and_tells_what_differs(luthier, runs, tmp_path):
    text = (runs / "second" / "recipe.yaml").read_text()
    (runs / "second" / "recipe.yaml").write_text(text.replace("learning_rate: 0.0002", "learning_rate: 0.0005"))
    result = luthier("runs", "diff", "first", "second", "--dir", runs, "--output", tmp_path / "both.png")
    assert result.status == 0, result.stderr
    assert "learning_rate" in result.stdout
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"
    found = luthier("runs", "diff", "first", "second", "--dir", runs, "--json").document
    assert found["options"] == [{"name": "learning_rate", "a": 0.0002, "b": 0.0005}]
    assert found["plot"] is None


def test_a_dry_replay_shows_what_would_change_and_trains_nothing(luthier, runs):
    before = sorted(path.name for path in runs.iterdir())
    result = luthier("runs", "replay", "first", "--dir", runs, "--set", "max_steps=2", "--dry-run", "--json")
    assert [change["name"] for change in result.document["changes"]] == ["max_steps"]
    assert not result.document["recipe_hash"]["same"]
    assert result.document["output_dir"] == str(runs / "first-2")
    assert "max_steps" in luthier("runs", "replay", "first", "--dir", runs, "--set", "max_steps=2", "--dry-run").stdout
    assert sorted(path.name for path in runs.iterdir()) == before


def test_a_replay_trains_the_same_losses_in_a_fresh_folder(luthier, runs, trained):
    result = luthier("runs", "replay", "first", "--dir", runs, "--json")
    assert result.status == 0, result.stderr
    found = result.document
    assert found["changes"] == []
    assert found["recipe_hash"]["same"]
    assert found["data"]["same"]
    assert found["run"]["loss_history"] == trained[0]["loss_history"]
    assert found["run"]["output_path"] == str(runs / "first-2")
    assert "none: the recipe is the run's" in result.stderr
    shutil.rmtree(runs / "first-2")


def test_a_replay_with_a_change_is_another_run(luthier, runs, tmp_path):
    words = ("--set", "max_steps=2", "--output-dir", tmp_path / "short")
    result = luthier("runs", "replay", "first", "--dir", runs, *words)
    assert result.status == 0, result.stderr
    assert "the same" in result.stdout
    assert (tmp_path / "short" / "run.json").exists()


@pytest.mark.parametrize("words", [["runs"], ["runs", "show", "first"], ["runs", "diff", "first", "second"],
                                   ["runs", "replay", "first", "--dry-run"]], ids=" ".join)  # fmt: skip
def test_looking_at_runs_loads_no_torch(runs, words):
    source = (
        "import sys\nfrom luthier.cli import main\n"
        f"sys.argv = ['luthier', *{words!r}, '--dir', {str(runs)!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    print(end.code, *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    status, *loaded = result.stderr.splitlines()[-1].split()
    assert status in ("0", "None"), result.stderr
    assert not {"torch", "transformers", "numpy", "matplotlib"} & set(loaded)


# the trial on one batch


def test_the_trial_on_one_batch_says_that_the_model_learns_and_exits_with_0(luthier, tiny, tmp_path):
    words = ("--overfit-one-batch", "--overfit-steps", "40", "--learning-rate", "0.02")
    result = luthier("train", tiny / "r.yaml", *words, "--output-dir", tmp_path / "run")
    assert result.status == 0, result.stdout + result.stderr
    for text in ("the model learns it", "supervised", "Gradient flow", "layers.0", "update / weight"):
        assert text in result.stdout, text
    assert not (tmp_path / "run").exists()


def test_the_trial_on_one_batch_exits_with_1_and_says_what_to_check(luthier, tiny, tmp_path):
    words = ("--overfit-one-batch", "--overfit-steps", "3", "--learning-rate", "0", "--output-dir", tmp_path / "run")
    result = luthier("train", tiny / "r.yaml", *words, "--json")
    assert result.status == 1
    assert not result.document["passed"]
    assert "learning rate is 0" in result.document["causes"][0]
    told = luthier("train", tiny / "r.yaml", *words)
    assert "does not learn it" in told.stdout
    assert "- the learning rate is 0: set learning_rate" in told.stdout
    [listed, _] = luthier("runs", "--dir", tmp_path, "--json").document["runs"]
    assert listed["state"] == "failed"
