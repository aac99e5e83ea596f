"""The JSON schema of recipes accepts what the reader accepts, and no key that the reader has not."""

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from luthier import LuthierError, Recipe
from luthier.plugins.registry import installed_plugins
from luthier.recipe.editor_schema.whole_recipe import make_schema
from luthier.recipe.reading.overrides import SECTIONS
from luthier.training.continual.tasks import TaskSequence

FORMS = [  # everything that a recipe may write in more than one way
    {"model": {"name_or_path": "demo", "dtype": "bf16"}},
    {"model": "${MODEL}", "data": {"train": "a.txt", "format": "${FORMAT}"}},
    {"data": ["a.jsonl", {"path": "b/rows", "columns": {"prompt": "question"}, "subset": "main"}]},
    {"data": {"path": "a.jsonl", "max_rows": 3, "max_length": 64}},
    {"data": {"train": "a.jsonl", "validation": "b.jsonl"}},
    {"data": {"train": {"path": "a.jsonl"}, "validation": 0.1}},
    {"data": {"train": ["a.jsonl"], "validation": [{"path": "b.jsonl"}, "c.jsonl"]}},
    {"adapter": "lora"},
    {"adapter": {"name": "lora", "r": 4, "target_modules": ["q_proj"]}},
    {"adapter": "qlora"},
    {"adapter": {"name": "qdora", "r": 4}},
    {"optimizer": {"weight_decay": 0.1}},
    {"optimizer": {"name": "adamw", "beta1": 0.8, "beta2": 0.9}},
    {"optimizer": "adamw_torch"},
    {"optimizer": {"lr": 1e-3}},
    {"learning_rate": "2e-4"},
    {"learning_rate": "auto"},
    {"max_steps": "none"},
    {"max_grad_norm": None},
    {"callbacks": "none"},
    {"callbacks": []},
    {"callbacks": "-plot"},
    {"callbacks": ["watch", "-plot", {"name": "early_stopping", "patience": 2}]},
    {"callbacks": {"name": "watch", "every": 2}},
    {"exact_callbacks": ["progress", {"name": "watch"}]},
    {"trainer": None},
    {"teacher": "demo"},
    {"teacher": {"model": "demo", "quantizer": "nf4"}},
    {"teacher": {"model": {"name_or_path": "demo"}}},
    {"reference": "base"},
    {"reference": {"model": "demo"}},
    {"distributed": "ddp"},
    {"distributed": {"strategy": "fsdp", "timeout": 5}},
    {"bf16": True, "gradient_checkpointing": "selective"},
]
WRONG = [
    {"adapter": {"name": "lora", "rr": 4}},
    {"adapter": {"r": 4}},
    {"adapter": "lorra"},
    {"adapter": {"name": "lora", "r": 0}},
    {"adapter": {"name": "lora", "r": "four"}},
    {"quantizer": None},
    {"trainer": 3},
    {"optimizer": {"name": "adamw", "lr": 1e-3}},
    {"optimizer": {"name": "sgd", "beta1": 0.9}},
    {"callbacks": ["-watch"]},
    {"callbacks": [{"every": 2}]},
    {"exact_callbacks": ["-plot"]},
    {"data": {"path": "a.jsonl", "max_lenght": 64}},
    {"data": {"train": [{"path": "a.jsonl", "colums": {}}]}},
    {"data": {"train": "a.jsonl", "columns": {"prompt": "question"}}},
    {"model": 3},
    {"reference": "first"},
    {"precision": "bf17"},
    {"learning_rate": "fast"},
    {"learning_rate": -1},
    {"packing": "yes"},
    {"distributed": "dp"},
    {"bf16": "maybe"},
]


@pytest.fixture(scope="module")
def validator(plugins):
    schema = make_schema(plugins)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("MODEL", "demo")
    monkeypatch.setenv("FORMAT", "text")


def is_read(mapping, plugins):
    try:
        Recipe.from_dict(mapping, plugins=plugins)
    except LuthierError:
        return False
    return True


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_that_the_reader_takes_is_valid(validator, plugins, least, form):
    validator.validate(least | form)
    own = {"bf16"} & set(form) or form.get("reference") or form.get("teacher")  # which need other settings as well
    assert own or is_read(least | form, plugins)


@pytest.mark.parametrize("form", WRONG, ids=str)
def test_what_the_reader_refuses_is_invalid(validator, plugins, least, form):
    assert not validator.is_valid(least | form)
    assert not is_read(least | form, plugins)


def places():
    """Mappings of a recipe, each with the function that puts a further key into it."""
    return {
        "the recipe": lambda key: {key: 1},
        "model": lambda key: {"model": {"name_or_path": "demo", key: 1}},
        "data": lambda key: {"data": {"train": "rows.jsonl", key: 1}},
        "a source": lambda key: {"data": [{"path": "rows.jsonl", key: 1}]},
        "an adapter": lambda key: {"adapter": {"name": "lora", key: 1}},
        "an optimizer": lambda key: {"optimizer": {"name": "sgd", key: 1}},
        "a callback": lambda key: {"callbacks": [{"name": "watch", key: 1}]},
        "a teacher": lambda key: {"teacher": {"model": "demo", key: 1}},
        "distributed": lambda key: {"distributed": {key: 1}},
    }


@settings(max_examples=60, deadline=None)
@given(place=st.sampled_from(sorted(places())), key=st.from_regex(r"[a-z]{1,3}_?[a-z]{0,6}", fullmatch=True))
def test_a_drawn_key_that_is_no_option_is_invalid_everywhere(validator, plugins, place, key):
    recipe = {"model": "demo", "data": "rows.jsonl"} | places()[place](key)
    assume(not is_read(recipe, plugins))
    errors = [error for error in validator.iter_errors(recipe) if key in error.message]
    known = key in validator.schema["properties"] or any(key in cls.__annotations__ for cls in SECTIONS.values())
    assert errors or known or key in ("r", "name", "lr")


def test_options_carry_their_meaning_and_default(validator):
    schema = validator.schema
    adapter, rate = schema["$defs"]["adapter-lora"]["properties"]["r"], schema["properties"]["learning_rate"]
    assert (adapter["default"], adapter["minimum"], adapter["description"]) == (8, 1, "Rank.")
    assert rate["default"] == 2e-4
    assert "peak learning rate" in rate["description"]
    assert schema["properties"]["lora_r"] | {"anyOf": []} == {
        "description": "Called adapter.r here.", "deprecated": True, "anyOf": []}  # fmt: skip


def test_tasks_of_a_sequence_are_recipes_with_a_name_and_data(plugins):
    validator = jsonschema.Draft202012Validator(make_schema(plugins, sequence=TaskSequence))
    task = {"name": "one", "data": "rows.jsonl", "learning_rate": 1e-3}
    assert validator.is_valid({"model": "demo", "tasks": [task]})
    for wrong in ({**task, "output_dir": "here"}, {**task, "learning_rat": 1}, {"name": "one"}):
        assert not validator.is_valid({"model": "demo", "tasks": [wrong]})
    assert not jsonschema.Draft202012Validator(make_schema(plugins)).is_valid({"model": "demo", "tasks": [task]})


def test_every_installed_part_is_in_the_schema_and_unknown_options_of_libraries_stay_open():
    definitions = make_schema()["$defs"]
    for offer in installed_plugins().offers():
        if offer.record.kind in (
            "adapter",
            "loss",
            "optimizer",
            "quantizer",
            "provider",
            "callback",
            "metric",
            "penalty",
            "trainer",
        ):
            own = definitions[f"{offer.record.kind}-{offer.record.name}"]
            assert own["description"] == offer.record.summary
            assert own.get("additionalProperties", True) is isinstance(offer.record.options, str)


@pytest.mark.slow  # imports peft
def test_a_complete_schema_has_the_options_that_only_libraries_know():
    definitions = make_schema(complete=True)["$defs"]
    assert all(own["additionalProperties"] is False for name, own in definitions.items() if name.startswith("adapter-"))
    assert "target_modules" in definitions["adapter-peft.ia3"]["properties"]
