"""An explicit option that nothing reads is refused, by its name and with what would read it."""

import ast
from pathlib import Path

import attrs
import luthier
import pytest
from luthier import LuthierError, Recipe
from luthier.recipe.checks.unread_options import READERS, default_value
from luthier.recipe.schema import Data, Distributed, Model, OtherModel, Settings, Source

CORE = Path(luthier.__file__).parent
ALONE = {  # another value than the default, and what makes it read
    "eval_steps": (2, {"data.validation": 0.1}),
    "eval_on_start": (True, {"data.validation": 0.1}),
    "max_eval_batches": (2, {"data.validation": 0.1}),
    "load_best_model_at_end": (True, {"data.validation": 0.1}),
    "metric_for_best_model": ("eval_accuracy", {"data.validation": 0.1}),
    "greater_is_better": (True, {"data.validation": 0.1}),
    "max_eval_answers": (4, {"metrics": ["exact_match"]}),
    "data.max_length": (64, {"data.block_size": None}),
    "data.overlong": ("drop", {"data.block_size": None}),
    "data.shuffle_buffer": (7, {"data.streaming": True}),
    "data.text_unit": ("line", {"data.train": [{"path": "a.txt.gz"}]}),
    "pure_bf16_update": ("float32_masters", {"precision": "pure_bf16"}),
}


def read(**settings):
    return luthier.recipe.load_recipe({"model": "demo", "data": "rows.jsonl"}, settings).recipe


def test_the_table_has_an_example_of_each():
    assert set(ALONE) == set(READERS)


@pytest.mark.parametrize("name", ALONE)
def test_an_option_is_refused_alone_and_taken_beside_what_reads_it(name):
    value, beside = ALONE[name]
    without = {"data.block_size": 32} if "data.block_size" in beside else {}
    with pytest.raises(LuthierError) as caught:
        read(**{name: value}, **without)
    assert caught.value.code == "recipe-conflict" and name in caught.value.where
    found = read(**{name: value}, **beside)
    above, _, field = name.rpartition(".")
    assert getattr(getattr(found, above) if above else found, field) == value


def test_a_default_that_is_written_out_is_no_conflict():
    for name in READERS:
        above, _, field = name.rpartition(".")
        assert isinstance(read(**{name: default_value(Data if above else Settings, field)}), Recipe)


@pytest.mark.parametrize(("name", "value"), [("split", "test"), ("name", "main"), ("revision", "v1")])
def test_a_file_is_given_nothing_that_only_datasets_of_the_hub_have(name, value):
    for path in ("rows.jsonl", "rows.csv.gz", "rows.txt"):
        with pytest.raises(LuthierError, match="is a file") as caught:
            read(**{"data.train": [{"path": path, name: value}]})
        assert caught.value.where.endswith(f"data.train.0.{name}")
    assert read(**{"data.train": [{"path": "owner/name", name: value}]})


def attributes_read():
    """Every attribute that the core reads, outside of the recipe's own schema and of those that only list options."""
    skipped = {CORE / "recipe" / "schema.py", CORE / "cli" / "screen" / "recipe_arguments.py"}
    trees = (ast.parse(path.read_text("utf-8")) for path in CORE.rglob("*.py") if path not in skipped)
    nodes = [node for tree in trees for node in ast.walk(tree)]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)} | texts


def test_every_option_of_the_schema_is_read_somewhere():
    known = attributes_read()
    fields = [(cls, field.name) for cls in (Settings, Model, OtherModel, Source, Data, Distributed)
              for field in attrs.fields(cls)]  # fmt: skip
    assert [(cls.__name__, name) for cls, name in fields if name not in known] == []


@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [
        ("eval_strategy", "steps", "eval_steps"),
        ("evaluation_strategy", "no", "data.validation"),
        ("early_stopping_patience", 3, "name: early_stopping, patience"),
        ("early_stopping_threshold", 0.1, "name: early_stopping, min_delta"),
        ("template", "llama3", "data.chat_template"),
    ],
)
def test_what_other_tools_say_in_one_word_gets_a_useful_answer(name, value, answer):
    with pytest.raises(LuthierError, match=name) as caught:
        read(**{name: value})
    assert answer in caught.value.remedy


@pytest.mark.parametrize(("written", "meant"), [("rank", "r"), ("dim", "r"), ("alpha", "lora_alpha")])
def test_an_option_that_others_call_so_is_proposed(written, meant, plugins):
    given = {"model": "demo", "data": "rows.jsonl", "adapter": {"name": "lora", written: 8}}
    with pytest.raises(LuthierError) as caught:
        luthier.recipe.load_recipe(given, plugins=plugins)
    assert caught.value.remedy == f"Did you mean {meant!r}?"
