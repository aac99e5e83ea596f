"""Missing files, unwritable folders and misspelt runs are refused before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from luthier.cli.screen.early_checks import check_writable, locate_model
from luthier.errors import LuthierError
from luthier.testing import expect_error

SCRIPT = """
import sys
from luthier.cli.app import app
try:
    app({words!r})
except SystemExit as end:
    print("torch" in sys.modules or "transformers" in sys.modules, end.code)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "--model", "demo", "--data", "missing.jsonl", "--json"], "data-not-found"),
        (
            ["train", "--model", "demo", "--data", "rows.jsonl", "--output-dir", "rows.jsonl/x", "--json"],
            "path-unwritable",
        ),
        (["generate", "runs/demoo", "hi", "--json"], "model-not-found"),
        (["merge", "runs/demoo", "--json"], "model-not-found"),
    ],
    ids=["data", "output", "generate", "merge"],
)
def test_a_wrong_place_is_refused_before_torch_is_imported(words, code, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\\n')
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(words=words)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    document, _, last = run.stdout.rstrip().rpartition("\n")
    assert json.loads(document)["error"]["code"] == code
    assert last == "False 2"


def test_the_table_of_a_finished_run_is_drawn_without_torch(trained, tiny):
    words = ["train", str(tiny / "r.yaml")]
    run = subprocess.run([sys.executable, "-c", SCRIPT.format(words=words)], capture_output=True, text=True, check=True)
    assert trained[0]["run_id"] in run.stdout and run.stdout.rstrip().endswith("False 0")


def test_a_finished_run_is_given_back_before_torch_is_imported(trained, tiny):
    words = ["train", str(tiny / "r.yaml"), "--json"]
    run = subprocess.run([sys.executable, "-c", SCRIPT.format(words=words)], capture_output=True, text=True, check=True)
    document, _, last = run.stdout.rstrip().rpartition("\n")
    assert json.loads(document)["run_id"] == trained[0]["run_id"]
    assert last == "False 0"


@pytest.mark.parametrize("name", ["runs/gsm", "./gsm", "gsmk", "/nowhere/at/all", "a/b/c"])
def test_a_path_to_nothing_names_the_runs_that_are_like_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "gsm8k").mkdir(parents=True)
    (tmp_path / "runs" / "gsm8k" / "run.json").write_text("{}")
    with pytest.raises(LuthierError) as caught:
        locate_model(name)
    assert (caught.value.code, caught.value.where) == ("model-not-found", name)
    assert ("runs/gsm8k" in caught.value.remedy) == ("gsm" in name)


@pytest.mark.parametrize("name", ["demo", "HuggingFaceTB/SmolLM2-135M", "gpt2"])
def test_what_may_be_a_name_of_the_hub_passes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate_model(name) == name


def test_a_run_is_found_by_its_exact_name_or_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, run_id in (("runs/gsm8k", "20260101-000000-aaaa"), ("runs/deep/er", "20260101-000001-bbbb")):
        write_run(tmp_path / place, run_id)
        assert locate_model(Path(place).name) == locate_model(run_id) == place
    assert locate_model("gpt2") == "gpt2"
    with expect_error("model-not-found", "20260101-000000"):  # an id is not abbreviated here
        locate_model("20260101-000000")
    write_run(tmp_path / "runs/other/er", "20260101-000002-cccc")
    with expect_error("run-ambiguous"):
        locate_model("er")
    (tmp_path / "gsm8k").mkdir()
    assert locate_model("gsm8k") == "gsm8k"  # what is here comes first


def write_run(folder, run_id):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_id": run_id, "state": "completed"}))


@pytest.mark.parametrize("verb", ["generate", "chat", "evaluate", "merge", "export", "push", "combine", "unmerge"])
def test_every_verb_of_trained_weights_takes_a_run_by_name(verb, luthier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "gsm8k", "20260101-000000-aaaa")
    more = {"generate": ["hi"], "export": ["--format", "gguf"], "push": ["me/it"], "combine": ["gsm8k", "--output-dir", "x"],
            "unmerge": ["gsm8k", "--output-dir", "x"]}  # fmt: skip
    error = luthier(verb, "gsm8k", *more.get(verb, ()), stdin="").stderr
    assert "runs/gsm8k" in error and "no such folder" not in error


def test_nothing_is_left_where_writing_was_tried(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_line_is_json_where_the_log_is(luthier, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    words = (
        "--model",
        "demo",
        "--data",
        tmp_path / "rows.jsonl",
        "--lora-r",
        "4",
        "--output-dir",
        tmp_path / "rows.jsonl" / "x",
    )
    result = luthier("train", *words, "--log_format", "json")
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["info", "error"]
    assert lines[-1]["code"] == "path-unwritable"
