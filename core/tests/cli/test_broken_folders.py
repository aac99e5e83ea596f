"""Broken folders of runs and models: each command that reads one gives its result or an error of ours."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUIET = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUIET, max_examples=60)
VALUES = st.sampled_from(
    [None, True, -1, 10**30, 1e308, float("nan"), "x", "", "\ud800", "a" * 5000, [], [None], {}, [{}]]
)
RUN_FILES = ["run.json", "recipe.yaml", "metrics.jsonl", "log.jsonl", "adapter/luthier.json", "adapter/adapter_config.json",
             "adapter/tokenizer.json", "adapter/tokenizer_config.json", "adapter/adapter_model.safetensors"]  # fmt: skip
MODEL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]


@st.composite
def damages(draw):
    """A function of a file's bytes: other values in its JSON, a cut, other bytes, or None for no file at all."""
    how = draw(st.sampled_from(["value", "value", "value", "cut", "bytes", "gone"]))
    places = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
    value, byte = draw(VALUES), draw(st.integers(0, 255))

    def damage(content: bytes) -> bytes | None:
        if how == "gone":
            return None
        if how == "cut":
            return content[: places[0] % (len(content) + 1)]
        if how == "value" and content[:1] in b"{[":
            try:
                return json.dumps(replaced(json.loads(content), places, value)).encode("utf-8", "surrogatepass")
            except ValueError:  # the lines of a file of JSON lines
                pass
        changed = bytearray(content or b"x")
        for place in places:
            changed[place % min(len(changed), 3000)] = byte
        return bytes(changed)

    return damage


def replaced(tree, places, value):
    """The tree with a value put at the place that these numbers lead to."""
    if not isinstance(tree, (dict, list)) or not tree or not places:
        return value
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[places[0] % len(keys)]
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[key] = replaced(tree[key], places[1:], value)
    return copy


@pytest.fixture
def act(luthier, tmp_path):
    """`act(folder, name, damage, command)`: the command on a copy of a folder with one file damaged."""

    def run(folder, name, damage, command):
        place = tmp_path / "runs" / "one"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        content = damage((place / name).read_bytes())
        if content is None:
            (place / name).unlink()
        else:
            (place / name).write_bytes(content)
        result = luthier(*command(place))
        assert result.status in (0, 1, 2), result
        assert "[internal]" not in result.stderr and "Traceback" not in result.stderr, result.stderr

    return run


READERS = [
    lambda run: ("runs", "--dir", run.parent),
    lambda run: ("runs", "show", run, "--json"),
    lambda run: ("runs", "diff", run, run, "--json"),
]
OPENERS = [
    lambda run: ("generate", run, "1?", "--max-new-tokens", "2"),
    lambda run: ("plan", run / "recipe.yaml"),
    lambda run: ("merge", run, run.parent / "merged"),
    lambda run: ("evaluate", run),
]


@QUIET
@given(name=st.sampled_from(RUN_FILES[:4]), damage=damages(), reader=st.sampled_from(READERS))
def test_no_broken_run_folder_makes_a_reader_fail(name, damage, reader, act, tiny, trained):
    act(tiny / "run", name, damage, reader)


@pytest.mark.slow
@LONG
@given(name=st.sampled_from(RUN_FILES), damage=damages(), opener=st.sampled_from([*READERS, *OPENERS]))
def test_no_broken_run_folder_makes_what_opens_it_fail(name, damage, opener, act, tiny, trained):
    act(tiny / "run", name, damage, opener)


@pytest.mark.slow
@LONG
@given(name=st.sampled_from(MODEL_FILES), damage=damages(), looks=st.booleans())
def test_no_broken_model_folder_makes_what_opens_it_fail(name, damage, looks, act, model_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')

    def command(model):
        return (
            ("inspect", "--data", rows, "--model", model)
            if looks
            else ("generate", model, "1?", "--max-new-tokens", "2")
        )

    act(model_folder, name, damage, command)
