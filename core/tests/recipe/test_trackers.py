"""`report_to`, as transformers has it: each tracker is a callback of that name, and nothing is reported unasked."""

from __future__ import annotations

import jsonschema
import pytest
from luthier.errors import LuthierError
from luthier.recipe import Recipe, load_recipe
from luthier.recipe.editor_schema.whole_recipe import make_schema
from luthier.recipe.reading.overrides import parse_flags

DEFAULTS = ["progress", "jsonl", "plot"]


def named(plugins, **given):
    recipe = Recipe.from_dict({"model": "demo", "data": "rows.jsonl", **given}, plugins=plugins)
    return [part["name"] for part in recipe.to_dict(plugins)["exact_callbacks"]]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"report_to": "watch"}, [*DEFAULTS, "watch"]),
        ({"report_to": ["watch"]}, [*DEFAULTS, "watch"]),
        ({"report_to": "watch", "callbacks": ["-plot"]}, ["progress", "jsonl", "watch"]),
        ({"report_to": "watch", "callbacks": [{"name": "watch", "every": 2}]}, [*DEFAULTS, "watch"]),
        ({"report_to": "watch", "callbacks": []}, ["watch"]),
        ({"report_to": "watch", "callbacks": "none"}, ["watch"]),
        ({"report_to": "watch", "exact_callbacks": ["jsonl"]}, ["jsonl", "watch"]),
        ({"report_to": ["watch", "watch"]}, [*DEFAULTS, "watch"]),
        ({"report_to": "none"}, DEFAULTS),
        ({"report_to": []}, DEFAULTS),
        ({"report_to": None}, DEFAULTS),
        ({"report_to": "watch, profiler"}, [*DEFAULTS, "watch", "profiler"]),
    ],
)
def test_each_tracker_is_a_callback_beside_the_others(given, meant, plugins):
    assert named(plugins, **given) == meant


@pytest.mark.parametrize(
    ("value", "code", "hint"),
    [
        ("wathc", "part-unknown", "watch"),
        ("all", "recipe-conflict", "Name the trackers"),
        (3, "recipe-wrong-type", "Known"),
        (["watch", 3], "recipe-wrong-type", "Known"),
    ],
)
def test_what_is_no_tracker_is_refused_at_its_place(value, code, hint, plugins, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: demo\ndata: rows.jsonl\nreport_to: {value}\n")
    with pytest.raises(LuthierError) as caught:
        load_recipe(path, plugins=plugins)
    assert (caught.value.code, caught.value.where) == (code, f"{path}:3: report_to")
    assert hint == "Known" or hint in caught.value.remedy


def test_the_flag_is_the_same_and_a_note_says_what_it_means(plugins):
    flags = parse_flags(["--model", "demo", "--data", "rows.jsonl", "--report-to", "watch"])
    reading = load_recipe(None, flags, plugins=plugins)
    assert [part["name"] for part in reading.recipe.to_dict(plugins)["exact_callbacks"]] == [*DEFAULTS, "watch"]
    assert "report_to adds the callback watch" in " ".join(reading.notes)


def test_editors_take_it(plugins):
    schema = make_schema(plugins)
    for value in ("wandb", ["wandb", "mlflow"], None):
        jsonschema.validate({"model": "demo", "report_to": value}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"report_to": 3}, schema)
