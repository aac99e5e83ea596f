"""From Python: two arguments that say the same thing contradict each other; a keyword over a recipe wins, and is told."""

import luthier
import pytest
from luthier import LuthierError
from luthier.recipe import load_recipe
from luthier.testing.worlds import tiny_model, tiny_tokenizer

ROWS = [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}] * 4
LOADED = {"model": tiny_model(), "tokenizer": tiny_tokenizer()}


def refused(where, told="given", verb=luthier.plan, **arguments):
    with pytest.raises(LuthierError) as caught:
        verb(**{"data": ROWS, "max_steps": 1, **arguments})
    assert where in caught.value.where and told in caught.value.problem, caught.value
    return caught.value


@pytest.mark.parametrize("validation", [
    {"validation": 0.2}, {"data.validation": 0.2}, {"data": {"train": "rows.jsonl", "validation": 0.2}},
])  # fmt: skip
@pytest.mark.parametrize("rows", [ROWS, "held.jsonl"])
def test_validation_beside_eval_data_in_one_call_is_a_conflict(validation, rows):
    assert refused("data.validation", model="demo", eval_data=rows, **validation).code == "recipe-conflict"


def test_eval_data_over_a_recipe_wins_and_is_told():
    found = luthier.plan({"data": {"train": ["nowhere.jsonl"], "validation": 0.5}}, model="demo", data=ROWS,
                         eval_data=ROWS[:3], max_steps=1)  # fmt: skip
    assert found.schedule["validation_examples"] == 3
    reading = load_recipe({"data": {"train": ["nowhere.jsonl"], "validation": 0.5}},
                          {"model": "demo", "data.validation": ["python:list"]})  # fmt: skip
    assert "replaces the data.validation" in " ".join(reading.notes)


@pytest.mark.parametrize("settings", [{"model.dtype": "bfloat16"}, {"dtype": "bf16"}, {"model.revision": "main"}])
def test_a_loaded_model_has_its_dtype(settings):
    assert refused("model.", "a loaded model", **LOADED, **settings).code == "recipe-conflict"


def test_a_loaded_tokenizer_is_not_given_twice():
    refused("model.tokenizer", "a loaded tokenizer", **LOADED, **{"model.tokenizer": "demo"})
    refused("model.tokenizer", "tokenizer is given", model="demo", tokenizer="demo", **{"model.tokenizer": "demo"})


def test_a_tokenizer_is_an_object_or_a_name(model_folder):
    named = luthier.plan(model=tiny_model(), tokenizer=str(model_folder), data=ROWS, max_steps=1)
    given = luthier.plan(**LOADED, data=ROWS, max_steps=1)
    assert named.packing == given.packing
    refused("nowhere", "no such folder", model="demo", tokenizer="./nowhere")
    assert refused("tokenizer", "tokenizer", model="demo", tokenizer=7).code == "recipe-wrong-type"


@pytest.mark.parametrize(("settings", "told"), [
    ({"backend": "nccl"}, ("CUDA",)), ({"backend": "gloo"}, ("distributed.backend",)), ({"timeout": 7.0}, ("distributed.timeout",)),
])  # fmt: skip
def test_one_process_reads_nothing_of_what_several_agree_on(settings, told, train):
    with pytest.raises(LuthierError) as caught:
        train(distributed=settings, device="cpu")
    assert all(fact in str(caught.value) for fact in told)
    assert caught.value.where == f"distributed.{next(iter(settings))}"


def test_a_strategy_is_a_recorded_decision_in_one_process_too(train, tmp_path):
    from luthier.runs.writing.record import read_record

    train(distributed="ddp", max_steps=1)
    assert read_record(tmp_path / "run")["decisions"]["distributed.strategy"]["value"] == "alone"


def test_a_whole_model_is_not_merged_and_a_folder_has_no_revision(model_folder):
    refused("merge", "nothing reads it", model="demo", adapter="full", merge=True)
    refused("model.revision", "nothing reads it", model=str(model_folder), **{"model.revision": "v1"})
