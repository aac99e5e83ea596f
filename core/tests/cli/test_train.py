"""`luthier train`: from a recipe, from flags, again, and what it says in the end."""

import json
import shutil
import signal
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def words(tiny):
    """Flags that train for two steps, all but the output folder."""
    line = f"--model {tiny}/llama --data {tiny}/rows.jsonl --max-steps 2 --exact-callbacks jsonl --device cpu"
    return [*line.split(), "--global-batch-size", "4", "--data.max-length", "128"]


def test_train_in_a_process_of_its_own_prints_one_document(trained):
    document, result = trained
    assert result.returncode == 0
    assert document["steps"] == 3
    assert len(document["loss_history"]) == 3
    assert document["eval_loss"] > 0
    assert {p["kind"] for p in document["parts"]} >= {"adapter", "loss", "optimizer", "quantizer", "provider"}
    assert "run_started" in result.stderr or "run started" in result.stderr


def test_the_run_is_in_its_folder(trained, tiny):
    document, _ = trained
    folder = tiny / "run"
    assert document["output_path"] == str(folder)
    for name in ("run.json", "recipe.yaml", "metrics.jsonl", "log.jsonl", "adapter"):
        assert (folder / name).exists()
    assert all(
        json.loads(line)["run"] == document["run_id"] for line in (folder / "log.jsonl").read_text().splitlines()
    )


def test_flags_train_without_a_recipe_and_the_table_says_what_came_of_it(luthier, words, tmp_path):
    out = tmp_path / "run"
    result = luthier("train", *words, "--optimizer", "sgd", "--optimizer.momentum", "0.5", "--lr", "0.01",
                     "--output-dir", out)  # fmt: skip
    assert result.status == 0, result.stderr
    for text in ("2 steps", "at the end", str(out), "luthier generate"):
        assert text in result.stdout
    assert result.stderr.count("lr is called learning_rate here") == 1
    recipe = (out / "recipe.yaml").read_text()
    assert "momentum: 0.5" in recipe
    assert "learning_rate: 0.01" in recipe


def test_a_flag_wins_over_the_recipe_and_set_says_the_same(luthier, tiny, tmp_path):
    flag = luthier("plan", tiny / "r.yaml", "--max-steps", "7", "--json")
    given = luthier("plan", tiny / "r.yaml", "--set", "max_steps=7", "--json")
    assert flag.document["schedule"]["total_steps"] == 7
    assert _planned(flag) == _planned(given)


def _planned(result):
    """The plan, without what the machine was doing at that moment."""
    return {name: value for name, value in result.document.items() if name not in ("time", "device")}


def test_the_same_command_again_says_that_the_run_is_finished_and_gives_its_numbers(luthier, trained, tiny):
    document, _ = trained
    again = luthier("train", tiny / "r.yaml", "--json")
    assert again.status == 0
    assert again.document["loss_history"] == document["loss_history"]
    assert "already finished" in again.stderr


def test_another_recipe_in_the_same_folder_is_refused(luthier, trained, tiny):
    result = luthier("train", tiny / "r.yaml", "--max-steps", "5", "--json")
    assert (result.status, result.document["error"]["code"]) == (2, "run-folder-other")


def test_rows_that_the_loss_does_not_take_are_told_before_the_folder_of_another_run(luthier, trained, tiny):
    pairs = tiny / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    error = luthier("train", tiny / "r.yaml", "--data", pairs, "--data.validation", "0", "--json").document["error"]
    assert (error["code"], error["where"]) == ("data-format", str(pairs))
    assert "dpo" in error["remedy"]
    error = luthier("train", tiny / "r.yaml", "--loss", "dpo", "--json").document["error"]
    assert (error["code"], error["where"]) == ("data-format", str(tiny / "rows.jsonl"))
    assert "sft" in error["remedy"]


def test_fresh_trains_in_a_folder_beside_it_with_the_same_losses(luthier, trained, tiny):
    document, _ = trained
    fresh = luthier("train", tiny / "r.yaml", "--fresh", "--json")
    assert fresh.document["output_path"] == str(tiny / "run-2")
    assert fresh.document["loss_history"] == document["loss_history"]
    shutil.rmtree(tiny / "run-2")


def test_a_dry_run_is_a_plan_and_writes_nothing(luthier, words, tmp_path):
    out = tmp_path / "run"
    dry = luthier("train", *words, "--output-dir", out, "--dry-run", "--json")
    plan = luthier("plan", *words, "--output-dir", out, "--json")
    assert _planned(dry) == _planned(plan)
    assert not out.exists()


def test_the_log_goes_where_and_how_it_is_asked(luthier, words, tmp_path):
    result = luthier("train", *words, "--output-dir", tmp_path / "run", "--log-level", "warning",
                     "--log-format", "json", "--log-file", tmp_path / "x.log")  # fmt: skip
    assert result.status == 0, result.stderr
    assert "run started" not in result.stderr
    assert all(json.loads(line)["level"] != "info" for line in (tmp_path / "x.log").read_text().splitlines())


def test_ctrl_c_stops_the_run_with_a_checkpoint_and_its_status(tiny, tmp_path):
    words = ["train", tiny / "r.yaml", "--max-steps", "100000", "--output-dir", tmp_path / "run", "--json"]
    line = [sys.executable, "-m", "luthier", *(str(word) for word in words)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        next(text for text in process.stderr if "run started" in text)
        process.send_signal(signal.SIGINT)
        told = json.loads(process.stdout.read())["error"]
    assert process.returncode == 130
    assert told["code"] == "interrupted"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "stopped"
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_train_without_torch_says_what_to_install(bare, tiny):
    result = bare("train", "--model", tiny / "llama", "--data", tiny / "rows.jsonl", "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.returncode, error["code"]) == (2, "dependency-missing")
    assert "torch" in error["problem"]
    assert 'pip install "luthier[local]"' in error["remedy"]
