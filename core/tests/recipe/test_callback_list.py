"""What a recipe's callbacks add to the defaults, take away, and how the written recipe holds them."""

from __future__ import annotations

import json

import pytest
from luthier.errors import LuthierError
from luthier.recipe import Recipe, load_recipe


def listed(given, plugins, name="callbacks"):
    """The names of the callbacks that a list means."""
    tree = {"model": "demo", "data": "rows.jsonl", name: given}
    return [part["name"] for part in Recipe.from_dict(tree, plugins=plugins).to_dict(plugins)["exact_callbacks"]]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["watch"], ["progress", "jsonl", "plot", "watch"]),
        ("watch", ["progress", "jsonl", "plot", "watch"]),
        (["-plot"], ["progress", "jsonl"]),
        (["-plot", "watch", "-progress"], ["jsonl", "watch"]),
        (["plot"], ["progress", "jsonl", "plot"]),
        (["watch", "jsonl", "progress", "plot"], ["progress", "jsonl", "plot", "watch"]),
        (
            [{"name": "watch", "every": 2}, {"name": "watch", "every": 3}],
            ["progress", "jsonl", "plot", "watch", "watch"],
        ),
        ([], []),
        ("none", []),
        (["none"], []),
    ],
)
def test_a_list_adds_to_the_defaults_and_a_minus_takes_one_away(given, meant, plugins):
    assert listed(given, plugins) == meant


def test_a_listed_default_takes_its_own_place_with_its_options(plugins):
    recipe = Recipe.from_dict(
        {"model": "demo", "data": "r.jsonl", "callbacks": [{"name": "plot", "smoothing": 0.5}]}, plugins=plugins
    )
    assert [getattr(callback, "smoothing", None) for callback in recipe.callbacks] == [None, None, 0.5]


def test_the_exact_list_adds_nothing(plugins):
    assert listed(["watch"], plugins, "exact_callbacks") == ["watch"]


@pytest.mark.parametrize(
    ("given", "where"), [(["-watch"], "callbacks.0"), (["plot", "-plot"], "callbacks.1"), (["-plto"], "callbacks.0")]
)
def test_what_is_no_default_cannot_be_taken_away(given, where, plugins):
    with pytest.raises(LuthierError) as caught:
        listed(given, plugins)
    assert (caught.value.code, caught.value.where) == ("recipe-conflict", where)


def test_both_lists_in_one_place_are_a_conflict(plugins):
    tree = {"model": "demo", "data": "r.jsonl", "callbacks": ["watch"], "exact_callbacks": ["jsonl"]}
    with pytest.raises(LuthierError) as caught:
        Recipe.from_dict(tree, plugins=plugins)
    assert caught.value.code == "recipe-conflict"


@pytest.mark.parametrize("below", ["callbacks", "exact_callbacks"])
@pytest.mark.parametrize("above", ["callbacks", "exact_callbacks"])
def test_the_later_layer_decides_who_watches(below, above, plugins, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: demo\ndata: r.jsonl\n{below}: [plot]\n")
    recipe = load_recipe(file, {above: ["watch"]}, environ={}, plugins=plugins).recipe
    names = [part["name"] for part in recipe.to_dict(plugins)["exact_callbacks"]]
    assert names == (["watch"] if above.startswith("exact") else ["progress", "jsonl", "plot", "watch"])


def test_a_written_recipe_holds_the_exact_list(plugins, tmp_path):
    recipe = Recipe.from_dict({"model": "demo", "data": "r.jsonl", "callbacks": ["-plot", "watch"]}, plugins=plugins)
    recipe.write(tmp_path / "recipe.yaml", plugins)
    assert "\ncallbacks:" not in (tmp_path / "recipe.yaml").read_text()
    again = Recipe.load(tmp_path / "recipe.yaml", environ={}, plugins=plugins)
    assert again.callbacks == recipe.callbacks


def test_an_option_by_number_is_that_of_the_exact_list(plugins, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: demo\ndata: r.jsonl\nexact_callbacks: [jsonl, watch]\n")
    recipe = load_recipe(file, {"callbacks.1.every": 7}, environ={}, plugins=plugins).recipe
    assert [getattr(callback, "every", None) for callback in recipe.callbacks] == [None, 7]


def test_the_recipe_in_an_older_run_folder_is_read_as_exact(plugins, tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: demo\ndata: r.jsonl\ncallbacks: [{name: watch}]\n")
    outside = Recipe.load(tmp_path / "recipe.yaml", environ={}, plugins=plugins)
    (tmp_path / "run.json").write_text(json.dumps({"state": "completed"}))
    inside = Recipe.load(tmp_path / "recipe.yaml", environ={}, plugins=plugins)
    assert (len(outside.callbacks), len(inside.callbacks)) == (4, 1)
