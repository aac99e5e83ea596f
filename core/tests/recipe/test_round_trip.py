"""A recipe and its plain data are the same thing: for every option of every installed part, in memory and in files."""

import enum
import functools
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

import attrs
import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from luthier import LuthierError, Recipe
from luthier.plugins.options import KEY, field_hints
from luthier.plugins.records import NoOptions
from luthier.plugins.registry import installed_plugins
from luthier.recipe import Data, Model, Source, recipe_hash
from luthier.recipe.checks.unread_options import READERS
from luthier.recipe.editor_schema.whole_recipe import make_schema
from luthier.recipe.parts import LISTS
from luthier.recipe.schema import OtherModel

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
PART_FIELDS = ("adapter", "loss", "optimizer", "quantizer", "provider")
LEAST = {"model": "demo", "data": "rows.jsonl"}
QUICK = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


def values(hint, bounds=None):
    """Values of a type within an option's bounds."""
    low, high = (bounds.low, bounds.high) if bounds else (None, None)
    if bounds and bounds.choices:
        return st.sampled_from(bounds.choices)
    if attrs.has(hint):
        return instances(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    simple = {
        int: lambda: st.integers(None if low is None else int(low), None if high is None else int(high)),
        float: lambda: st.floats(low, high, allow_nan=False, allow_infinity=False),
        bool: st.booleans,
        str: lambda: TEXT,
        type(None): st.none,
        Path: lambda: TEXT.map(Path),
        Any: lambda: st.recursive(st.none() | st.booleans() | st.integers() | TEXT, st.lists, max_leaves=3),
    }
    return simple[hint]() if hint in simple else compound(hint, bounds)


def compound(hint, bounds):
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values(a, bounds) for a in arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1], bounds), max_size=2)
    if origin is tuple and Ellipsis not in arguments:
        return st.tuples(*(values(a, bounds) for a in arguments))
    items = st.lists(values(arguments[0] if arguments else str, bounds), max_size=3)
    return items.map(origin)


@st.composite
def instances(draw, cls):
    """Objects of an options class; those that its own checks refuse are not drawn."""
    chosen = {
        f.alias: draw(values(field_hints(cls)[f.name], f.metadata.get(KEY)))
        for f in attrs.fields(cls)
        if f.init and (f.default is attrs.NOTHING or draw(st.booleans()))
    }
    try:
        return cls(**chosen)
    except LuthierError:
        assume(False)


@functools.cache
def validator(plugins):
    return jsonschema.Draft202012Validator(make_schema(plugins))


def check(recipe, plugins, folder):
    plain = json.loads(json.dumps(recipe.to_dict(plugins)))
    validator(plugins).validate(
        plain | {"metrics": [], "penalties": []}
    )  # whose names are looked up later, and drawn at random here
    assert Recipe.from_dict(plain, plugins=plugins) == recipe
    path = folder / "recipe.yaml"
    located = Recipe.from_dict(plain, base=Path.cwd(), plugins=plugins)
    located.write(path, plugins)
    assert Recipe.load(path, environ={}, plugins=plugins) == located
    assert recipe_hash(Recipe.load(path, environ={}, plugins=plugins), plugins) == recipe_hash(recipe, plugins)


IN_LISTS = {"callback": "callbacks"} | {kind: name for name, kind in LISTS.items()}
IN_RECIPES = (*PART_FIELDS, *IN_LISTS)  # other kinds, such as exporters, are chosen by a verb
OFFERS = [(o.record.kind, o.record.name) for o in installed_plugins().offers() if o.record.kind in IN_RECIPES]


@pytest.mark.parametrize(("kind", "name"), OFFERS, ids=[f"{k}-{n}" for k, n in OFFERS])
def test_every_installed_part_survives_plain_data_and_a_file(kind, name, tmp_path):
    known = installed_plugins()
    cls = known.options(known.get(kind, name))

    @settings(QUICK, max_examples=2 if name.startswith("peft.") else 4)
    @given(options=st.just(name) if cls is NoOptions else instances(cls))
    def survives(options):
        part = {IN_LISTS[kind]: [options]} if kind in IN_LISTS else {kind: options}
        check(Recipe.from_dict(LEAST | part), known, tmp_path)

    survives()


def test_options_of_every_type_survive_plain_data_and_a_file(plugins, options, tmp_path):
    @QUICK
    @given(given_options=instances(options.Many))
    def survives(given_options):
        check(Recipe.from_dict(LEAST | {"adapter": given_options}, plugins=plugins), plugins, tmp_path)

    survives()


@st.composite
def run_settings(draw):
    """The recipe's own settings as plain data, without the contradictions that `test_checks` is about."""
    apart = (*PART_FIELDS, *LISTS, "trainer", "callbacks", "model", "data", "device", "gradient_accumulation_steps")
    fields = [f for f in attrs.fields(Recipe) if f.name not in apart]
    hints = field_hints(Recipe)
    chosen = {f.name: draw(values(hints[f.name], f.metadata[KEY])) for f in fields if draw(st.booleans())}
    chosen.pop(draw(st.sampled_from(["warmup_steps", "warmup_ratio"])), None)
    chosen.pop(draw(st.sampled_from(["global_batch_size", "per_device_train_batch_size"])), None)
    chosen["max_steps"] = 2**70
    chosen.pop("lr_multipliers", None)  # regular expressions, which text drawn at random seldom is
    if chosen.get("training_mode", "auto") != "auto":  # a mode stands beside its own limit alone
        limit = {"epoch": "num_train_epochs", "step": "max_steps", "token": "max_tokens"}.get(chosen["training_mode"])
        chosen = {n: v for n, v in chosen.items() if n not in ("num_train_epochs", "max_steps", "max_tokens")}
        chosen |= {limit: 2} if limit else {}
    chosen["max_shard_size"] = draw(st.sampled_from(["5GB", "1.5 mb", "300KB"]))
    strategy = chosen.get("save_strategy", "auto")
    if strategy != "auto":  # so does a strategy, beside its own interval
        chosen = {n: v for n, v in chosen.items() if n not in ("save_steps", "save_samples", "load_best_model_at_end")}
        chosen |= {f"save_{strategy}": 3} if strategy in ("steps", "samples") else {}
    if "distributed" in chosen:
        chosen["distributed"] = attrs.asdict(chosen["distributed"])
    for field in ("reference", "teacher"):
        if isinstance(other := chosen.get(field), OtherModel):
            named = attrs.evolve(other.model, name_or_path=draw(TEXT.filter(bool)), dropout=None)
            chosen[field] = attrs.asdict(attrs.evolve(other, model=named, quantizer="none"))
    if chosen.get("max_grad_norm") == 0:
        del chosen["max_grad_norm"]  # refused, as it would clip every gradient to nothing
    sources = st.lists(
        st.builds(attrs.evolve, instances(Source), path=TEXT.map(lambda t: f"rows{t}")), min_size=1, max_size=2
    ).map(unweighted_alone)
    validation = draw(st.floats(0.01, 0.5) | sources)
    data = attrs.evolve(draw(instances(Data)), train=draw(sources), validation=validation)
    data = attrs.evolve(data, streaming=data.streaming and not isinstance(validation, float))
    chosen["teacher_cache"] = chosen.get("teacher_cache", False) and not data.streaming
    chosen["reference_cache"] = chosen.get("reference_cache", False) and not data.streaming
    chosen |= {"max_tokens_per_device": "auto"} if data.block_size is not None else {}
    model = attrs.evolve(draw(instances(Model)), name_or_path=draw(TEXT.filter(bool)))
    return {"model": attrs.asdict(model), "data": attrs.asdict(data), **chosen}


def unweighted_alone(sources):
    """The sources; an only one without a weight, which is refused as it changes nothing."""
    return sources if len(sources) > 1 else [attrs.evolve(sources[0], weight=1.0)]


def test_every_setting_survives_plain_data_and_a_file(plugins, tmp_path):
    @settings(QUICK, max_examples=20)
    @given(mapping=run_settings())
    def survives(mapping):
        escaped = json.loads(json.dumps(mapping).replace("${", "$${"))
        check(without_unread(escaped, plugins), plugins, tmp_path)

    survives()


def without_unread(mapping, plugins):
    """The recipe of a mapping without the options that nothing in it reads, which are refused by name."""
    while True:
        try:
            return Recipe.from_dict(mapping, plugins=plugins)
        except LuthierError as error:
            (section, _, name) = ("." + error.where).rpartition(".")
            if error.where not in READERS:
                raise
            del (mapping[section[1:]] if section else mapping)[name]


def test_recipes_made_in_python_survive_as_well(plugins):
    recipe = Recipe(
        model=Model(name_or_path="demo"), data=Data(train=[Source(path="a.jsonl")]), adapter={"name": "full"}, seed=3
    )
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_name_a_mapping_and_options_are_the_same_part(make, options):
    ways = ["lora", {"name": "lora"}, {"name": "lora", "r": 8}, options.Lora(), options.Lora(r=8)]
    recipes = [make(adapter=way) for way in ways]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert make(adapter=options.Lora(r=9)) != recipes[0]
    assert make(adapter="dora") != recipes[0]


def test_a_recipe_in_python_equals_the_same_one_from_plain_data():
    direct = Recipe(model=Model(name_or_path="demo"), data=Data(train=[Source(path="rows.jsonl")]))
    assert direct == Recipe.from_dict(LEAST)
    assert direct != Recipe.from_dict(LEAST | {"seed": 1})
    assert direct != "a recipe"


def test_the_plain_data_holds_every_default(make, plugins):
    plain = make(adapter="lora").to_dict(plugins)
    assert plain["adapter"] == {"name": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": None}
    fields = {f.name for f in attrs.fields(Recipe)}
    assert set(plain) == fields - {"callbacks"} | {"exact_callbacks"}
    assert plain["exact_callbacks"][0] == {"name": "progress"}
    assert set(plain["data"]["train"][0]) == {f.name for f in attrs.fields(Source)}


def test_the_hash_sees_what_determines_the_run_and_nothing_else(make, plugins):
    first = recipe_hash(make(), plugins)
    watching = {
        "output_dir": "elsewhere",
        "exact_callbacks": [],
        "logging_steps": 7,
        "save_total_limit": 2,
        "run_name": "x",
    }
    assert recipe_hash(make(**watching), plugins) == first
    for change in ({"seed": 1}, {"adapter": "lora"}, {"learning_rate": 1e-5}, {"data": "other.jsonl"}):
        assert recipe_hash(make(**change), plugins) != first
    assert recipe_hash(make(adapter={"name": "full"}), plugins) == first


def test_a_dollar_that_is_meant_literally_survives(make, plugins, monkeypatch):
    monkeypatch.setenv("WORD", "seen")
    recipe = make(run_name="$${WORD} $$${WORD} ${WORD} $WORD ${")
    assert recipe.run_name == "${WORD} $${WORD} seen $WORD ${"
    assert Recipe.from_dict(recipe.to_dict(plugins), plugins=plugins) == recipe
