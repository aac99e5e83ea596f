"""The command line of train, plan and inspect: where the recipe stands, free flags, and the help of options."""

from pathlib import Path

import attrs
import pytest
from luthier.cli.screen.recipe_arguments import GROUPS, PARTS, grouped, split_words
from luthier.plugins.options import describe_options
from luthier.plugins.registry import installed_plugins
from luthier.recipe import Recipe
from luthier.recipe.parts import FIELDS


@pytest.mark.parametrize(
    ("words", "path", "flags"),
    [
        ([], None, []),
        (["r.yaml"], "r.yaml", []),
        (["r", "--seed", "1"], "r", ["--seed", "1"]),
        (["--seed", "1", "r.toml"], "r.toml", ["--seed", "1"]),
        (["--seed=1", "r.yaml"], "r.yaml", ["--seed=1"]),
        (["--model", "m", "--data", "rows.json"], None, ["--model", "m", "--data", "rows.json"]),
        (["--data.validation", "0.1"], None, ["--data.validation", "0.1"]),
    ],
)
def test_the_recipe_comes_first_or_last(words, path, flags):
    assert split_words(words) == (Path(path) if path else None, flags)


def test_every_setting_of_a_run_is_in_exactly_one_group():
    apart = {"model", "data", *PARTS}
    names = [name for group in GROUPS.values() for name in group.split()]
    assert sorted(names) == sorted({f.name for f in attrs.fields(Recipe)} - apart)


def test_a_setting_that_no_group_names_is_still_shown():
    new = attrs.evolve(describe_options(Recipe)[-1], name="brand_new")
    assert grouped([*describe_options(Recipe), new])["Further"] == [new]


def test_help_of_train_shows_its_own_flags_and_every_setting(luthier):
    result = luthier("train", "--help")
    assert result.status == 0
    for flag in ("--set", "--resume", "--fresh", "--dry-run", "--json", "--log-level", "--log-format", "--log-file"):
        assert f"  {flag}" in result.stdout
    for name in GROUPS["Batches"].split() + GROUPS["The run"].split():
        assert f"--{name.replace('_', '-')} " in result.stdout
    for title in (*GROUPS, "--data.max-length", "--model.dtype", "2048", "at least 1"):
        assert title in result.stdout


def test_help_of_train_names_the_installed_parts(luthier):
    text = luthier("train", "--help").stdout
    records = [offer.record for offer in installed_plugins().offers() if "." not in offer.record.name]
    for record in (record for record in records if record.kind in (*FIELDS, "callback")):
        assert record.name in text


@pytest.mark.parametrize("verb", ["train", "plan", "inspect"])
def test_help_of_a_part_shows_each_of_its_options(luthier, verb):
    result = luthier(verb, "--optimizer", "adamw", "--help")
    assert result.status == 0
    assert "Usage" not in result.stdout
    for text in ("--optimizer.betas", "--optimizer.weight-decay", "float", "default 0.01", "luthier 0.1.0"):
        assert text in result.stdout


def test_every_option_of_every_installed_light_part_is_in_the_help_of_the_part(luthier):
    for offer in installed_plugins().offers():
        if isinstance(offer.record.options, str) or offer.record.kind not in (*FIELDS, "callback"):
            continue  # a schema that belongs to a heavy library is resolved in the tests of its plugin
        field = "callbacks" if offer.record.kind == "callback" else offer.record.kind
        text = luthier("train", f"--{field}", offer.record.name, "--help").stdout
        for option in describe_options(offer.record.options):
            assert f".{option.name.replace('_', '-')} " in text, (offer.record.name, option.name)


def test_help_of_several_parts_shows_each(luthier):
    text = luthier("train", "--loss", "sft", "--callbacks", "[jsonl, plot]", "--help").stdout
    assert "loss sft" in text
    assert "callback jsonl" in text
    assert "--callbacks.1.smoothing" in text


def test_help_of_a_part_given_with_options_is_that_of_the_part(luthier):
    text = luthier("train", "--optimizer", "{name: sgd, momentum: 0.5}", "--help").stdout
    assert "optimizer sgd" in text
    assert "--optimizer.nesterov" in text


def test_help_of_an_unknown_part_is_the_error_of_an_unknown_part(luthier):
    result = luthier("train", "--optimizer", "adamv", "--help")
    assert result.status == 2
    assert "[part-unknown]" in result.stderr
    assert "'adamw'" in result.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["missing.yaml"], "recipe-not-found"),
        (["--model", "m", "--data", "d", "--lerning-rate", "1"], "recipe-unknown-option"),
        (["--model", "m", "--data", "d", "--learning-rate", "fast"], "recipe-wrong-type"),
        (["--model", "m", "--data", "d", "--set", "optimizer.eps=-1"], "recipe-out-of-range"),
        (["--model", "m", "--data", "d", "--adapter", "lorra"], "part-unknown"),
        (["--data", "d"], "recipe-missing"),
        (["--model", "m", "--data", "d", "extra"], "recipe-unknown-option"),
    ],
)
def test_a_mistake_on_the_command_line_is_an_error_with_a_code(luthier, words, code):
    result = luthier("plan", *words, "--json")
    assert result.status == 2
    assert result.document["error"]["code"] == code
    assert result.stderr == ""
