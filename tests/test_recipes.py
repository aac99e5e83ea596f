"""The recipes of docs/recipes on the public sets that they name, and those that made the embedded model."""

import json
import math
import os
from pathlib import Path

import jsonschema
import luthier
import pytest
from luthier import Recipe
from luthier.demo import MODEL
from luthier.recipe.editor_schema.whole_recipe import make_schema
from luthier.recipe.reading.recipe_files import read_recipe_file
from luthier.training.continual.tasks import TaskSequence
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
EVERY = sorted((ROOT / "docs/recipes").iterdir())
SEQUENCES = [path for path in EVERY if "tasks" in read_recipe_file(path)[0]]  # for `luthier continual`
RECIPES = [path for path in EVERY if path not in SEQUENCES]
MAKING = sorted(MODEL.parent.glob("pretrain-*.yaml"))
named = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
LATER = (
    "five_tasks",
    "gpteacher",
    "grpo",
    "infonce",
    "npo",
    "osft",
    "provider_samples",
    "sft",
    "ternary_dpo",
)  # whose first steps are like those of another recipe


def marked(paths):
    """The paths, of which those that add little to the default suite are marked slow."""
    return [pytest.param(path, marks=pytest.mark.slow) if path.stem in LATER else path for path in paths]


def sources(path):
    """The files that a recipe names, as it writes them."""
    data = read_recipe_file(path)[0]["data"]
    held = data.get("validation")
    return [source["path"] for source in (*data["train"], *(held if isinstance(held, list) else ()))]


@pytest.fixture
def needs():
    """`needs(recipe)` skips where its data is not here."""

    def check(path):
        if "LUTHIER_DATA" not in os.environ:
            pytest.skip("LUTHIER_DATA is not set: docs/data.md says where the example sets come from")
        absent = [text for text in sources(path) if not Path(os.path.expandvars(text)).is_file()]
        if absent:
            pytest.skip(f"not here: {', '.join(absent)}; docs/data.md says where the example sets come from")

    return check


def evaluations(run):
    """The losses on held-out rows, in the order in which they were measured."""
    lines = map(json.loads, (run.output_path / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("path", marked(RECIPES), ids=lambda path: path.stem)
def test_a_recipe_takes_its_first_steps(path, needs, tmp_path):
    needs(path)
    few = {"max_steps": 2} if path.stem == "grpo" else {"max_steps": 2, "max_eval_batches": 1}
    run = luthier.train(path, output_dir=tmp_path / "run", merge=False, **few)
    assert run.steps == 2
    assert run.artifact.is_dir()
    assert (run.output_path / "loss.png").is_file()


@pytest.mark.parametrize("path", marked(SEQUENCES), ids=lambda path: path.stem)
def test_a_sequence_takes_its_first_steps(path, tmp_path):
    if not (Path(os.environ.get("LUTHIER_DATA", "")) / "cl_tasks").is_dir():
        pytest.skip("LUTHIER_DATA has no cl_tasks: docs/data.md says where the example sets come from")
    report = luthier.continual(path, output_dir=tmp_path / "run", max_steps=1, max_eval_batches=1)
    assert [len(row) for row in report.metrics["eval_loss"]] == [len(report.tasks)] * len(report.tasks)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "grpo"], ids=lambda path: path.stem)
def test_a_recipe_trains_as_given_and_the_loss_on_held_out_rows_falls(path, needs, tmp_path):
    needs(path)
    run = luthier.train(path, output_dir=tmp_path / "run")
    recipe, found = Recipe.load(path), evaluations(run)
    assert run.stop_reason is None
    planned = json.loads((run.output_path / "run.json").read_text())["total_steps"]
    assert run.steps == planned or run.tokens_seen >= recipe.max_tokens
    assert found[-1] == run.eval_loss < found[0] - 0.05
    assert (run.merged is not None) == recipe.merge


@named
def test_the_data_page_says_where_the_files_of_a_recipe_come_from(path):
    page = (ROOT / "docs/data.md").read_text("utf-8")
    assert all(f"`{text.removeprefix('${LUTHIER_DATA}/')}`" in page for text in sources(path))


def test_every_recipe_names_the_schema_for_editors_and_is_valid_under_it():
    validator = jsonschema.Draft202012Validator(make_schema(sequence=TaskSequence))
    for path in (*EVERY, *MAKING, ROOT / "core/src/luthier/demo/recipe.yaml"):
        tree = read_recipe_file(path)[0]
        assert [error.message for error in validator.iter_errors(tree)] == [], path
        assert not validator.is_valid(tree | {"learning_rat": 1}), path
    lines = {path.read_text("utf-8").splitlines()[0] for path in EVERY}
    assert lines == {"# yaml-language-server: $schema=luthier.schema.json"}


def test_the_recipes_show_the_parts_of_the_repository():
    """Each way of training once, so that a part that stops working on real rows is noticed."""
    trees = [read_recipe_file(path)[0] for path in RECIPES]
    chosen = {
        v["name"] if isinstance(v, dict) else v
        for t in trees
        for k in ("adapter", "optimizer", "quantizer")
        if (v := t.get(k))
    }
    assert chosen >= {"lora", "dora", "full", "peft.ia3", "lion", "sgd", "int8", "qlora", "qdora", "bitnet"}


def test_the_recipes_that_made_the_embedded_model_read_what_making_writes_and_each_other(tmp_path):
    for path in MAKING:
        (tmp_path / path.name).write_text(path.read_text("utf-8"))
    first, second = (Recipe.load(tmp_path / path.name) for path in MAKING)
    written = [str(tmp_path / name) for name in ("corpus.jsonl", "chats.jsonl")]
    assert [source.path for source in first.data.train] == [source.path for source in second.data.train] == written
    assert first.model.name_or_path == str(tmp_path / "model")
    assert second.model.name_or_path == f"{first.output_dir}/model"


def test_the_card_of_the_embedded_model_gives_its_figures():
    card = (MODEL.parent / "README.md").read_text("utf-8")
    with safe_open(MODEL / "model.safetensors", framework="pt") as held:
        shapes = [held.get_slice(name).get_shape() for name in held.keys()]  # noqa: SIM118 - safe_open is no mapping
    shape = json.loads((MODEL / "config.json").read_text("utf-8"))
    figures = [sum(map(math.prod, shapes)), shape["vocab_size"], shape["max_position_embeddings"]]
    figures += [shape["vocab_size"] * shape["hidden_size"]]
    assert all(f"{figure:,}" in card for figure in figures)
    assert f"{shape['num_hidden_layers']} layers of width {shape['hidden_size']}" in card
    assert f"{(MODEL / 'model.safetensors').stat().st_size / 1e6:.1f} MB" in card
