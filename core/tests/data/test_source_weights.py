"""Weights of sources: each row of a source counts by them, in memory and in a stream, or they are refused."""

from __future__ import annotations

import json

import pytest
from luthier import LuthierError, Recipe
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import prepare_data
from luthier.jobs.rows.service_rows import training_rows
from luthier.recipe.schema import Data, Source
from luthier.testing import expect_error
from luthier.training.trainers.trainer_refusals import check_trainer


@pytest.fixture
def files(tmp_path):
    """Three files of 40, 10 and 6 rows."""
    for name, count in (("a", 40), ("b", 10), ("c", 6)):
        lines = [json.dumps({"text": f"{name}{i:02}"}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def data_of(files, options, **others):
    sources = [Source(path=str(files / f"{name}.jsonl"), **own) for name, own in options.items()]
    return Data(train=sources, cache=False, **others)


def run(files, tokenizer, options, **others):
    return prepare_data(data_of(files, options, **others), tokenizer, seed=0)


WEIGHED = {"a": {"weight": 0.5}, "b": {"repeat": 2, "weight": 3.0}, "c": {}}


def weights_of(examples):
    """The weight of the rows of each file."""
    return {name: {e.weight for e in examples if f"/{name}.jsonl" in e.where} for name in WEIGHED}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_has_the_weight_of_its_source_in_memory_and_in_a_stream(streaming, files, chat):
    prepared = run(files, chat(None), WEIGHED, streaming=streaming)
    examples = prepared.train.head(1000) if streaming else prepared.train
    assert weights_of(examples) == {"a": {0.5}, "b": {3.0}, "c": {1.0}}
    if not streaming:
        assert [s["weight"] for s in prepared.report.sources] == [0.5, 3.0, 1.0]


def test_the_weight_of_a_source_multiplies_that_of_its_rows_and_of_those_held_back(files, chat):
    for name in WEIGHED:
        lines = (files / f"{name}.jsonl").read_text().splitlines()
        rows = [{**json.loads(line), "score": 2.0 if i % 2 else 1.0} for i, line in enumerate(lines)]
        (files / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {name: {**own, "columns": {"weight": "score"}} for name, own in WEIGHED.items()}
    prepared = run(files, chat(None), options, validation=0.3)
    every = [*prepared.train, *prepared.validation]
    assert weights_of(every) == {"a": {0.5, 1.0}, "b": {3.0, 6.0}, "c": {1.0, 2.0}}
    assert len({e.weight for e in prepared.validation}) > 2


def test_a_weighted_source_of_validation_rows_is_weighted_too(files, chat):
    held = [Source(path=str(files / "b.jsonl"), weight=2.0), Source(path=str(files / "c.jsonl"))]
    prepared = run(files, chat(None), {"a": {}}, validation=held)
    assert weights_of(prepared.validation) == {"a": set(), "b": {2.0}, "c": {1.0}}


def test_a_stream_of_other_weights_is_another_stream(files, chat):
    prints = [
        run(files, chat(None), {"a": {}, "b": {"weight": weight}}, streaming=True).train.fingerprint
        for weight in (1.0, 2.0, 3.0)
    ]
    assert len({*prints}) == 3
    assert run(files, chat(None), {"a": {}, "b": {}}, streaming=True).train.fingerprint == prints[0]


@pytest.mark.parametrize(
    ("others", "where"),
    [({"block_size": 7}, "data.block_size"), ({"wanted": Wanted(kind="preference")}, "b.jsonl: weight")],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_weight_that_nothing_can_read_is_refused(others, where, streaming, files, chat):
    if "wanted" in others:
        for name in ("a", "b"):
            (files / f"{name}.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    wanted = {"wanted": others["wanted"]} if "wanted" in others else {}
    data = data_of(files, {"a": {}, "b": {"weight": 2.0}}, streaming=streaming, block_size=others.get("block_size"))
    with pytest.raises(LuthierError) as caught:
        prepare_data(data, chat(None), seed=0, **wanted)
    assert caught.value.code == "recipe-conflict" and where in caught.value.where


def test_the_weight_of_an_only_source_is_refused_as_it_changes_nothing(files):
    with expect_error("recipe-conflict", "data.train.0.weight"):
        Recipe.from_dict({"model": "demo", "data": {"train": [{"path": str(files / "a.jsonl"), "weight": 2.0}]}})


def test_training_on_a_weighted_source_is_training_on_weighted_rows_bit_for_bit(files, train, tmp_path):
    rows = [json.loads(line) for line in (files / "b.jsonl").read_text().splitlines()]
    (files / "w.jsonl").write_text("".join(json.dumps({**row, "score": 3.0}) + "\n" for row in rows))
    other = {"path": str(files / "c.jsonl")}
    by_source, by_row, plain = (
        train(data={"train": [other, source]}, max_steps=2, output_dir=tmp_path / name)
        for name, source in (
            ("source", {"path": str(files / "b.jsonl"), "weight": 3.0}),
            ("row", {"path": str(files / "w.jsonl"), "columns": {"weight": "score"}}),
            ("plain", {"path": str(files / "b.jsonl")}),
        )
    )
    assert by_source.loss_history == by_row.loss_history != plain.loss_history


class Idle:
    """A trainer that would do nothing."""

    def check(self, recipe):
        pass

    def train(self, session):
        pass


@pytest.mark.parametrize("name", ["share", "repeat", "weight"])
def test_a_trainer_or_a_service_does_not_read_it_and_says_so(name, files):
    options = {"a": {}, "b": {name: 2 if name == "repeat" else 0.5}}
    sources = [{"path": str(files / f"{file}.jsonl"), **own} for file, own in options.items()]
    with expect_error("recipe-conflict", "data.train", name):
        check_trainer(Recipe.from_dict({"model": "demo", "data": sources, "max_steps": 1, "trainer": Idle()}))
    with expect_error("recipe-conflict", "data.train", name):
        list(training_rows(data_of(files, options), False, 0))
