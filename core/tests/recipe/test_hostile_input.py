"""Hostile or absurd input ends quickly, in one error of ours: no reader of a recipe hangs, fills memory or breaks."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.error_lists import TOLD, join_errors
from luthier.errors import LuthierError as Error
from luthier.errors import suggest_nearest
from luthier.recipe import load_recipe
from luthier.recipe.reading.recipe_files import DEEPEST, LARGEST, LONGEST, READERS

SECONDS = 20.0  # on a loaded machine; alone each takes less than two, and took a minute or more
LONG = "k" * 200_000
BARE = 'model = "demo"\ndata = "d.jsonl"\n'
TEXTS = {  # file name: (its text, what the error says)
    "a key.toml": (f'"{LONG}" = 1\n', f"{LONGEST} are allowed"),
    "a bare key.toml": (f"{LONG} = 1\n", f"{LONGEST} are allowed"),
    "dots.toml": (".".join("a" * 100_000) + " = 1\n", f"more than {DEEPEST} deep"),
    "a table.toml": ("[" + ".".join("a" * 100_000) + "]\nb = 1\n", f"more than {DEEPEST} deep"),
    "tables.toml": ("".join(f"[{'.'.join(['a'] * n)}]\n" for n in range(1, 60)), f"more than {DEEPEST} deep"),
    "unknown.toml": (BARE + "".join(f"option_{i} = 1\n" for i in range(20_000)), "more"),
    "unknown.yaml": ("".join(f"option_{i}: 1\n" for i in range(20_000)), "more"),
    "a key.json": (json.dumps({LONG: 1}), f"{LONGEST} are allowed"),
    "deep.json": ('{"model": ' + "[" * 40 + "]" * 40 + "}", f"more than {DEEPEST} deep"),
    "deeper.json": ('{"model": ' + "[" * 50_000 + "]" * 50_000 + "}", "deep"),
    "large.yaml": ("model: demo\n#" + "x" * LARGEST, f"larger than {LARGEST:,} bytes"),
    "nan.yaml": ("model: demo\ndata: {train: .nan}\n", "expected a list"),
    "nan data.yaml": ("model: demo\ndata: .nan\n", "data"),
    "nan model.yaml": ("model: .nan\ndata: d.jsonl\n", "model"),
    "nan callbacks.yaml": ("model: demo\ndata: d.jsonl\ncallbacks: .nan\n", "callbacks"),
    "nan part.yaml": ("model: demo\ndata: d.jsonl\nadapter: [.nan]\n", "adapter"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_recipe_that_is_none_is_refused_quickly_and_briefly(name, tmp_path):
    text, told = TEXTS[name]
    (tmp_path / name).write_text(text)
    began = time.process_time()
    with pytest.raises(LuthierError, match=told.replace("(", "\\(")) as caught:
        load_recipe(tmp_path / name)
    assert time.process_time() - began < SECONDS and len(str(caught.value)) < 20_000


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=8)  # fmt: skip
KNOWN = st.sampled_from(["model", "data", "adapter", "callbacks", "reference", "teacher", "distributed", "data.train",
                         "lr_scheduler_kwargs", "metrics", "lr_multipliers", "tokenizer", "eval_data"])  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KNOWN, JSON, max_size=4))
def test_any_plain_data_is_a_recipe_or_an_error_of_ours(tree):
    try:
        load_recipe({"model": "demo", "data": "d.jsonl"} | tree)
    except LuthierError as error:
        assert error.code.startswith(("recipe-", "part-", "artifact-", "run-", "data-"))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    suffix=st.sampled_from(sorted(READERS)),
    content=st.binary(max_size=60) | st.text(alphabet='[]{}:=."#&*-\n ab1', max_size=60),
)
def test_any_file_is_a_recipe_or_an_error_of_ours(tmp_path, suffix, content):
    path = tmp_path / f"recipe{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LuthierError):  # none of these names a model and its rows
        load_recipe(path)


def test_only_the_first_errors_are_told_and_the_others_counted():
    joined = join_errors([Error("usage", f"number {i}") for i in range(TOLD + 5)])
    assert len(joined.also) == TOLD and joined.also[-1].problem == "and 5 more"


@given(st.text(min_size=101, max_size=300))
def test_nothing_near_is_looked_for_beside_a_name_of_no_sensible_length(name):
    assert "Did you mean" not in suggest_nearest(name, [name, "other"])
