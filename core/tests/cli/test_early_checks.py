"""Missing files, unwritable folders and misspelt runs are refused before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from luthier.cli.screen.early_checks import check_writable, locate_model
from luthier.data import first_look
from luthier.data.first_look import check_first_rows
from luthier.data.prepare import prepare_data
from luthier.errors import LuthierError
from luthier.model.load import tokenizer_of
from luthier.recipe.recipe import load_recipe
from luthier.testing import expect_error

SCRIPT = """
import sys
from luthier.cli.app import app
try:
    app({words!r})
except SystemExit as end:
    print("torch" in sys.modules or "transformers" in sys.modules, end.code)
"""

SCRIPTS = """
import contextlib, io, json, sys
from luthier.cli.app import app
for words in {lines!r}:
    with contextlib.redirect_stdout(io.StringIO()) as document:
        try:
            app([*words, "--json"])
        except SystemExit as end:
            status = end.code
    code = json.loads(document.getvalue())["error"]["code"]
    print(code, "torch" in sys.modules or "transformers" in sys.modules, status)
"""

REFUSED = {
    "train --model demo --data missing.jsonl": "data-not-found",
    "train --model demo --data rows.jsonl --output-dir rows.jsonl/x": "path-unwritable",
    "train --model demo --data rows.jsonl --output-dir others": "run-folder-other",
    "train --model demo --data rows.jsonl --merge true": "recipe-conflict",
    "train --model demo --data columns.jsonl": "data-format",
    "train --model demo --data broken.jsonl": "data-row",
    "plan --model demo --data broken.jsonl": "data-row",
    "generate runs/demoo hi": "model-not-found",
    "merge runs/demoo": "model-not-found",
    "export others --format nothing": "part-unknown",
}


def test_wrong_places_rows_and_folders_are_refused_before_torch_is_imported(tmp_path):
    write_rows(tmp_path)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").touch()
    script = SCRIPTS.format(lines=[line.split() for line in REFUSED])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert [tuple(line.split()) for line in run.stdout.splitlines()] == [
        (code, "False", "2") for code in REFUSED.values()
    ]


def write_rows(folder):
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "columns.jsonl").write_text('{"x": "a", "y": "b"}\n')
    rows = ['{"prompt": "a", "completion": "b"}', '{"prompt": "a"', '{"prompt": "a", "completion": ""}']
    (folder / "broken.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("name", ["columns", "broken"])
def test_what_is_refused_without_torch_is_refused_in_the_words_of_the_run(name, tmp_path):
    write_rows(tmp_path)
    recipe = load_recipe({"model": "demo", "data": str(tmp_path / f"{name}.jsonl")}).recipe
    with pytest.raises(LuthierError) as early:
        check_first_rows(recipe)
    with pytest.raises(LuthierError) as late:
        prepare_data(recipe.data, tokenizer_of(recipe.model), seed=0)
    assert str(early.value) == str(late.value) and early.value.remedy == late.value.remedy


@pytest.mark.parametrize(
    "settings",
    [
        {"data.bad_rows": "drop"},
        {"data.streaming": True},
        {"model": "some/hub-model"},
        {"data.chat_template_kwargs": {"padding": True}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_bad_rows_that_the_run_alone_can_judge_are_left_to_it(settings, tmp_path):
    write_rows(tmp_path)
    check_first_rows(load_recipe({"model": "demo", "data": str(tmp_path / "broken.jsonl")}, settings).recipe)
    with expect_error("data-format", "columns.jsonl"):
        check_first_rows(load_recipe({"model": "demo", "data": str(tmp_path / "columns.jsonl")}, settings).recipe)


def test_rows_are_not_read_whole_for_the_sake_of_a_look(tmp_path, monkeypatch):
    (tmp_path / "long.jsonl").write_text('{"text": "a"}\n' * 2000 + "{\n")
    (tmp_path / "rows.json").write_text('[{"x": "a"}]')
    long, rows = (load_recipe({"model": "demo", "data": str(path)}).recipe for path in sorted(tmp_path.iterdir()))
    check_first_rows(long)
    with expect_error("data-format", "rows.json"):
        check_first_rows(rows)
    monkeypatch.setattr(first_look, "SMALL", 5)
    assert check_first_rows(rows) is None


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
