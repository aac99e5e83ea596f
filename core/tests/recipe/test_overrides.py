"""Flags, --set and LUTHIER_* variables: one meaning, one precedence, and texts that stay texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError, Recipe
from luthier.plugins.structure import bare_value
from luthier.recipe import parse_flags, parse_sets
from luthier.recipe.reading.overrides import from_environment, parse_value

FILE = """\
model: {name_or_path: base, revision: abc, dtype: bfloat16}
data: {train: [{path: a.jsonl, columns: {prompt: q}}], max_length: 64, validation: 0.1}
adapter: {name: lora, r: 4, lora_alpha: 32}
seed: 1
"""


@pytest.fixture
def path(file):
    return file("recipe.yaml", FILE)


def failure(act, *given):
    with pytest.raises(LuthierError) as caught:
        act(*given)
    return caught.value


def flags(text):
    return {".".join(o.steps): bare_value(o.value) for o in parse_flags(text.split())}


def test_flags_are_kebab_or_snake_with_or_without_equals():
    text = "--adapter lora --adapter.lora-alpha 16 --learning_rate=1e-4 --data D --no-packing --merge --seed=-3"
    assert flags(text) == {
        "adapter": "lora", "adapter.lora_alpha": 16, "learning_rate": 1e-4, "data": "D", "packing": False,
        "merge": True, "seed": -3,
    }  # fmt: skip


def test_a_switch_takes_no_word_that_is_not_true_or_false():
    assert flags("--packing false --merge true --seed -1") == {"packing": False, "merge": True, "seed": -1}
    assert failure(parse_flags, ["--packing", "recipe.yaml"]).where == "recipe.yaml"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--learning-rat", "1"], "recipe-unknown-option", ("--learning-rat", "'learning_rate'")),
        (["--data.max-lenght", "1"], "recipe-unknown-option", ("--data.max-lenght", "'data.max_length'")),
        (["extra"], "recipe-unknown-option", ("extra",)),
        (["--seed", "1", "--seed", "2"], "recipe-conflict", ("--seed",)),
        (["--learning-rate"], "recipe-missing", ("--learning-rate",)),
        (["--learning-rate", "--merge"], "recipe-missing", ("--learning-rate",)),
        (["--data.max-length"], "recipe-missing", ("--data.max-length",)),
        (["--adapter"], "recipe-missing", ("--adapter",)),
        (["--adapter.r"], "recipe-unknown-option", ("--adapter.r",)),
        (["--no-packing=true"], "recipe-conflict", ("--no-packing",)),
        (["--no-nonsense"], "recipe-unknown-option", ("--no-nonsense",)),
        (["--batch-size", "4"], "recipe-conflict", ("--batch-size", "global_batch_size")),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused(read, words, code, says):
    error = failure(read, None, ["--model", "demo", "--data", "d.jsonl", *words])
    assert error.code == code
    assert all(fact in str(error) for fact in says)


def test_flag_environment_and_set_mean_the_same(path, read, plugins):
    by_flag = read(path, "--adapter.r 9 --learning-rate 1e-3").recipe
    by_variable = read(path, "", {"LUTHIER_ADAPTER__R": "9", "LUTHIER_LEARNING_RATE": "1e-3"}).recipe
    by_set = Recipe.load(path, ["adapter.r=9", "learning_rate=1e-3"], environ={}, plugins=plugins)
    in_python = Recipe.load(path, {"adapter.r": 9, "learning_rate": 1e-3}, environ={}, plugins=plugins)
    assert by_flag == by_variable == by_set == in_python
    assert (by_flag.adapter.r, by_flag.adapter.lora_alpha) == (9, 32)


def test_flag_wins_over_environment_over_file_over_default(path, read):
    environ = {"LUTHIER_SEED": "2"}
    assert read(path, "--seed 3", environ).recipe.seed == 3
    assert read(path, "", environ).recipe.seed == 2
    assert read(path).recipe.seed == 1
    assert read(None, "--model demo --data d.jsonl").recipe.seed == 0


@settings(max_examples=40, deadline=None)
@given(layers=st.lists(st.sampled_from(["file", "environment", "flag"]), unique=True), kebab=st.booleans())
def test_the_highest_layer_that_speaks_is_heard(plugins, tmp_path_factory, layers, kebab):
    from luthier.recipe import load_recipe

    at = {"file": 10, "environment": 20, "flag": 30}
    path = tmp_path_factory.mktemp("layers") / "r.yaml"
    path.write_text("model: demo\ndata: d.jsonl\n" + ("max_steps: 10\n" if "file" in layers else ""))
    environ = {"LUTHIER_MAX_STEPS": "20"} if "environment" in layers else {}
    words = ["--max-steps" if kebab else "--max_steps", "30"] if "flag" in layers else []
    found = load_recipe(path, parse_flags(words), environ=environ, plugins=plugins).recipe.max_steps
    assert found == max((at[layer] for layer in layers), default=None)


def test_an_option_of_a_part_that_was_a_name_makes_it_a_mapping(file, read):
    path = file("r.yaml", "model: demo\ndata: d.jsonl\nadapter: lora\nexact_callbacks: [jsonl, watch]\n")
    recipe = read(path, "--adapter.r 5 --optimizer.weight-decay 0.5 --callbacks.1.every 3").recipe
    assert (recipe.adapter.r, recipe.optimizer.weight_decay, recipe.callbacks[1].every) == (5, 0.5, 3)


def test_the_order_of_flags_does_not_matter(read):
    words = ["--model", "demo", "--data", "d.jsonl", "--adapter", "lora", "--adapter.r", "5"]
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    backwards = [word for pair in reversed(pairs) for word in pair]
    assert read(None, words).recipe == read(None, backwards).recipe


def test_another_part_by_flag_drops_the_files_options_and_says_so(path, read):
    reading = read(path, "--adapter dora")
    assert (reading.recipe.adapter.r, reading.recipe.adapter.lora_alpha) == (8, 16)
    assert reading.notes == ("--adapter: dora replaces lora, and with it adapter.r, adapter.lora_alpha",)


@pytest.mark.parametrize("flag", ["--adapter lora", "--adapter.name lora", "--adapter.r 4"])
def test_the_same_part_by_flag_keeps_the_files_options(path, read, flag):
    reading = read(path, flag)
    assert (reading.recipe.adapter.r, reading.recipe.adapter.lora_alpha) == (4, 32)
    assert reading.notes == ()


def test_an_error_in_a_kept_option_still_names_the_file(file, read):
    path = file("r.yaml", "model: demo\ndata: d.jsonl\nadapter:\n  name: lora\n  r: zero\n")
    assert failure(read, path, "--adapter lora").where == f"{path}:5: adapter.r"


def test_a_mapping_by_flag_replaces_the_part(path, read):
    assert read(path, ["--adapter", "{name: lora, r: 3}"]).recipe.adapter.lora_alpha == 16


def test_another_model_by_flag_has_not_the_files_revision(path, read):
    reading = read(path, "--model other")
    assert (reading.recipe.model.name_or_path, reading.recipe.model.revision) == ("other", None)
    assert reading.recipe.model.dtype == "bfloat16"
    assert reading.notes == ("--model: another model, so model.revision is dropped",)
    assert read(path, "--model base").recipe.model.revision == "abc"
    assert read(path, "--model other --model.revision x").recipe.model.revision == "x"


def test_list_items_are_reached_by_their_index(path, read):
    recipe = read(path, "--data.train.0.path b.jsonl --data.train.0.max-rows 5 --data.train.0.columns.my-col x").recipe
    source = recipe.data.train[0]
    assert source.path.endswith("/b.jsonl")
    assert (source.max_rows, source.columns) == (5, {"prompt": "q", "my-col": "x"})
    error = failure(read, path, "--data.train.1.path c.jsonl")
    assert str(error).startswith("--data.train.1.path: the list has 1 items, counted from 0 (found '1')")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", "16"), ("true", "true"), ("1e-4", "1e-4"), ("#1", "#1"), ("a #b", "a #b"), ("a: b", "a: b"),
        ("- a", "- a"), ("'16'", "16"), ('"x y"', "x y"), ("{a", "{a"), ("*x", "*x"), ("007", "007"), ("none", "none"),
        ("[a, b]", "[a, b]"), ("!x y", "!x y"), ("a\\b", "a\\b"), ("null", None),
    ],
)  # fmt: skip
def test_a_text_option_keeps_the_text_that_was_written(read, text, expected):
    assert read(None, ["--model", "demo", "--data", "d.jsonl", "--run-name", text]).recipe.run_name == expected


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", "[1, 2]", ["1", "2"]),
        ("target_modules", "null", None),
        ("pair", "[0.1, 1]", (0.1, 1.0)),
        ("ranks", "{q_proj: 4, v_proj: 8}", {"q_proj": 4, "v_proj": 8}),
        ("extra", "{a: [1, true, x], b: {c: 2e-4}}", {"a": [1, True, "x"], "b": {"c": 2e-4}}),
        ("steps", "auto", "auto"),
        ("steps", "3", 3),
        ("limit", "none", None),
        ("label", "3", "3"),
        ("bias", "true", True),
    ],
)
def test_the_options_type_decides_how_a_flag_is_read(read, flag, text, expected):
    words = ["--model", "demo", "--data", "d.jsonl", "--adapter", "many", f"--adapter.{flag}", text]
    assert getattr(read(None, words).recipe.adapter, flag) == expected


@pytest.mark.parametrize(
    ("flag", "text"), [("r", "16.0"), ("r", "x"), ("bias", "yes"), ("pair", "0.5"), ("ranks", "4")]
)
def test_a_flag_of_another_type_is_refused(read, flag, text):
    words = ["--model", "demo", "--data", "d.jsonl", "--adapter", "many", f"--adapter.{flag}", text]
    error = failure(read, None, words)
    assert error.where == f"--adapter.{flag}"
    assert error.code == "recipe-wrong-type"


def test_unknown_variables_are_refused_with_the_nearest(read):
    error = failure(read, None, "--model demo --data d.jsonl", {"LUTHIER_LERNING_RATE": "1"})
    assert (error.code, error.where) == ("recipe-unknown-option", "LUTHIER_LERNING_RATE")
    assert error.remedy.startswith("Did you mean 'LUTHIER_LEARNING_RATE'")
    assert "LUTHIER_DATA__MAX_LENGTH" in failure(from_environment, {"LUTHIER_DATA__MAXLENGTH": "1"}).remedy


def test_reserved_variables_are_no_options(read):
    environ = {"LUTHIER_DATA": "/sets", "LUTHIER_DISABLE_PLUGINS": "x", "LUTHIER_EXAMPLES": "3", "OTHER": "y"}
    assert read(None, "--model demo --data d.jsonl", environ).recipe.data.train[0].path.endswith("d.jsonl")


def test_a_wrong_variable_names_itself(path, read):
    error = failure(read, path, "", {"LUTHIER_ADAPTER__R": "many"})
    assert str(error).startswith("LUTHIER_ADAPTER__R: adapter.r: expected int (found 'many')")


def test_set_needs_a_name_and_a_value():
    assert [(o.steps, bare_value(o.value)) for o in parse_sets(["adapter.b=c=d"])] == [(("adapter", "b"), "c=d")]
    assert failure(parse_sets, ["seed"]).problem == "expected a.b=value"
    assert "learning_rate" in failure(parse_sets, ["learning_rat=1"]).remedy


def test_objects_and_mappings_override_in_python(path, plugins, options):
    given = {"adapter": options.Dora(r=3), "data": {"max_length": 32}, "exact_callbacks": ["jsonl"]}
    recipe = Recipe.load(path, given, environ={}, plugins=plugins)
    assert recipe.adapter == options.Dora(r=3)
    assert (recipe.data.max_length, len(recipe.data.train), len(recipe.callbacks)) == (32, 1, 1)


def test_a_wrong_override_in_python_is_not_blamed_on_the_file(path, plugins):
    error = failure(lambda: Recipe.load(path, {"adapter.r": "x"}, environ={}, plugins=plugins))
    assert error.where == "adapter.r"


def test_options_below_an_object_are_refused(plugins, options):
    from luthier.recipe import load_recipe

    given = {"model": "demo", "data": "d", "adapter": options.Lora(), "adapter.r": 3}
    error = failure(lambda: load_recipe(None, given, environ={}, plugins=plugins))
    assert (error.code, error.where) == ("recipe-wrong-type", "adapter.r")


def test_options_below_a_number_are_refused(read):
    error = failure(read, None, "--model demo --data d.jsonl --seed 1 --seed.x 2")
    assert str(error).startswith("--seed.x: seed has no options to set (found 1)")


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_text_is_a_value(text):
    value = parse_value(text)
    assert bare_value(value) is None or isinstance(bare_value(value), (str, int, float, bool, list, dict))


def test_another_recipe_is_a_start_and_keeps_its_objects(make, plugins, options):
    from luthier.builtin import AdamW
    from luthier.recipe import load_recipe

    class Own:
        def build(self, groups): ...
        def evaluating(self): ...

    def change(recipe, **changes):
        return load_recipe(
            recipe, changes, environ={"LUTHIER_SEED": "9"}, plugins=plugins
        ).recipe  # not for Python data

    own = Own()
    start = make(optimizer=own, adapter=options.Lora(r=4), run_name="$${HOME}", learning_rate=1e-3)
    assert change(start) == start
    changed = change(start, lr=1e-4, per_device_train_batch_size=3, **{"adapter.lora_alpha": 7})
    assert (changed.optimizer, changed.run_name) == (own, "${HOME}")
    assert (changed.learning_rate, changed.global_batch_size) == (1e-4, 3)
    assert changed.adapter == options.Lora(r=4, lora_alpha=7)
    assert change(start, optimizer=AdamW(eps=1e-6)).optimizer.eps == 1e-6
    assert change({"model": "demo", "data": "d"}, seed=3).seed == 3
