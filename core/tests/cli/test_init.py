"""`luthier init`: four questions, and a recipe that trains."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from luthier import Recipe

CHAT = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
ROWS = {
    "messages": CHAT,
    "prompt_completion": {"prompt": "One?", "completion": "Two."},
    "questions": {"question": "One?", "answer": "Two."},
    "text": {"text": "Once upon a time."},
    "preference": {"prompt": "One?", "chosen": "Two.", "rejected": "Three."},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """`place("messages", 30)`: a working folder with a file of such rows."""
    monkeypatch.chdir(tmp_path)

    def made(kind, count=30):
        Path("rows.jsonl").write_text("".join(json.dumps(ROWS[kind]) + "\n" for _ in range(count)))
        return tmp_path

    return made


@pytest.mark.parametrize(
    ("kind", "form", "loss"),
    [
        ("messages", "messages", "sft"),
        ("prompt_completion", "prompt_completion", "sft"),
        ("questions", "prompt_completion", "sft"),
        ("text", "text", "sft"),
        ("preference", "preference", "dpo"),
    ],
)
def test_the_rows_propose_format_and_loss_and_the_recipe_is_whole(luthier, place, kind, form, loss):
    place(kind)
    made = luthier("init", "--json")
    assert made.status == 0, made.stdout
    assert made.document["format"] == form
    assert made.document["next"] == [
        "luthier plan recipe.yaml", "luthier train recipe.yaml", "luthier chat runs/recipe"]  # fmt: skip
    recipe = Recipe.load("recipe.yaml")
    assert recipe.data.train[0].path == str(Path("rows.jsonl").absolute())
    assert recipe.data.train[0].columns == (
        {"prompt": "question", "completion": "answer"} if kind == "questions" else {}
    )
    assert recipe.to_dict()["loss"]["name"] == loss
    text = Path("recipe.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=luthier.schema.json\n")
    assert "path: rows.jsonl" in text  # beside the recipe, so that both can be moved


def test_the_recipe_is_valid_under_the_schema_that_is_written_beside_it(luthier, place):
    import yaml

    place("messages")
    assert luthier("init", "first.yaml", "--yes").status == 0
    validator = jsonschema.Draft202012Validator(json.loads(Path("luthier.schema.json").read_text()))
    validator.validate(yaml.safe_load(Path("first.yaml").read_text()))


def test_each_flag_answers_its_question(luthier, place):
    folder = place("messages")
    model = ("--model", "Qwen/Qwen3-8B")
    said = luthier("init", "a.yaml", "--yes", *model, "--method", "full", "--where", "24")
    assert said.status == 0 and "needs about 139 GiB" in said.stdout
    recipe = Recipe.load("a.yaml")
    assert (recipe.model.name_or_path, recipe.model.dtype) == ("Qwen/Qwen3-8B", "float32")
    assert recipe.gradient_checkpointing is True
    assert "needs" not in luthier("init", "b.yaml", "--yes", *model, "--method", "lora", "--where", "80").stdout
    assert "not known" in luthier("init", "e.yaml", "--json", "--where", "8").document["memory"]
    assert Recipe.load("b.yaml").gradient_checkpointing is False
    assert Recipe.load("b.yaml").model.dtype == "bfloat16"
    made = luthier("init", "c.yaml", "--json", "--where", "together", "--data", folder / "rows.jsonl")
    assert made.document["settings"]["provider"] == "together"
    assert made.document["next"][1] == "luthier submit c.yaml"
    luthier("init", "d.yaml", "--yes", "--method", "qlora", "--data", "user/rows")
    assert Recipe.load("d.yaml").to_dict()["quantizer"]["name"] == "nf4"
    assert Recipe.load("d.yaml").data.train[0].path == "user/rows"


def test_paths_are_written_as_the_recipe_will_read_them_in_a_folder_of_its_own(luthier, place):
    place("messages")
    Path("sub").mkdir()
    Path("mine").mkdir()
    luthier("init", "sub/a.yaml", "--yes", "--data", "*.jsonl", "--model", "mine")
    recipe = Recipe.load("sub/a.yaml")
    assert Path(recipe.data.train[0].path) == Path("*.jsonl").absolute()
    assert Path(recipe.model.name_or_path) == Path("mine").absolute()


def test_a_file_that_holds_no_rows_is_not_taken_for_them(luthier, place, tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    Path("package.json").write_text('{"name": "site", "version": "1"}')
    assert luthier("init", "--yes").status == 0
    assert "package.json" not in Path("recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--yes", "--data", "rowz.jsonl"), "data-not-found", "rowz.jsonl"),
        (("--yes", "--method", "lorra"), "part-unknown", "Did you mean 'lora'"),
        (("--yes", "--method", "dpo"), "data-format", "takes preference rows"),
        (("--yes", "--where", "mars"), "part-unknown", "local"),
        (("--yes", "--model", "./none"), "model-not-found", "./none"),
        (("none/first.yaml", "--yes"), "path-unwritable", "no such folder"),
        (("first.json", "--yes"), "usage", "YAML"),
        (("--model", "demo"), "usage", "--data, --method, --where, or --yes"),
        (("there.yaml", "--yes"), "path-unwritable", "is not replaced"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(luthier, place, words, code, says):
    folder = place("messages")
    Path("there.yaml").write_text("mine\n")
    result = luthier("init", *words)
    assert result.status == 2
    assert f"[{code}]" in result.stderr
    assert says in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl", "there.yaml"]
    assert Path("there.yaml").read_text() == "mine\n"


def test_a_terminal_is_asked_and_a_wrong_answer_is_asked_again(place):
    folder = place("messages")
    master, worker = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier", "init"],
        cwd=folder, stdin=worker, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(worker)
    os.write(master, b"\n\nlorra\nfull\n\n")
    output, said = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 0, said
    assert "Model (a hub name, a folder, or demo) [demo]" in said
    assert "Data (a file, a glob, or a hub dataset) [rows.jsonl]" in said
    assert "Did you mean 'lora'" in said
    assert "luthier train recipe.yaml" in output
    assert Recipe.load(folder / "recipe.yaml").to_dict()["adapter"]["name"] == "full"


@pytest.mark.slow  # trains
def test_a_newcomer_comes_from_nothing_to_an_answer(luthier, place):
    place("questions", 24)
    for line in (
        ("init", "--yes"),
        ("plan", "recipe.yaml"),
        ("train", "recipe.yaml", "--max-steps", "2"),
        ("generate", "runs/recipe", "One?", "--max-new-tokens", "4"),
    ):
        result = luthier(*line)
        assert result.status == 0, result.stderr
