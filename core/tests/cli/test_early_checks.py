"""Missing files, unwritable folders and misspelt runs are refused before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from luthier.cli.screen.early_checks import check_model_name, check_writable
from luthier.errors import LuthierError

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


@pytest.mark.parametrize("name", ["runs/gsm", "./gsm", "gsmk", "/nowhere/at/all", "a/b/c"])
def test_a_path_to_nothing_names_the_runs_that_are_like_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "gsm8k").mkdir(parents=True)
    (tmp_path / "runs" / "gsm8k" / "run.json").write_text("{}")
    with pytest.raises(LuthierError) as caught:
        check_model_name(name)
    assert (caught.value.code, caught.value.where) == ("model-not-found", name)
    assert ("runs/gsm8k" in caught.value.remedy) == ("gsm" in name)


@pytest.mark.parametrize("name", ["demo", "HuggingFaceTB/SmolLM2-135M", "gpt2"])
def test_what_may_be_a_name_of_the_hub_passes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_model_name(name) is None


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
