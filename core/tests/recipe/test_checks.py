"""Settings that contradict each other, and short forms that stand for longer ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError, Recipe
from luthier.recipe import Data, Model, Source

VALIDATED = {"data": {"train": "rows.jsonl", "validation": 0.1}}


@pytest.mark.parametrize(
    ("given_settings", "code", "where"),
    [
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "recipe-conflict", "warmup_ratio"),
        ({"data": {"train": "a", "validation": 0.51}}, "recipe-out-of-range", "data.validation"),
        ({"data": {"train": "a", "validation": -0.1}}, "recipe-out-of-range", "data.validation"),
        ({"data": {"train": "a", "validation": 1}}, "recipe-out-of-range", "data.validation"),
        ({"data": {"train": []}}, "recipe-missing", "data.train"),
        ({"data": {"train": "a", "validation": []}}, "recipe-missing", "data.validation"),
        ({"data": ["a", ""]}, "recipe-missing", "data.train.1.path"),
        ({"data": {"max_length": 4}}, "recipe-missing", "data.train"),
        ({"model": ""}, "recipe-missing", "model.name_or_path"),
        ({"eval_steps": 5}, "recipe-conflict", "eval_steps"),
        ({"eval_on_start": True}, "recipe-conflict", "eval_on_start"),
        ({"max_eval_batches": 5}, "recipe-conflict", "max_eval_batches"),
        ({"load_best_model_at_end": True}, "recipe-conflict", "load_best_model_at_end"),
        ({"num_train_epochs": 0}, "recipe-out-of-range", "num_train_epochs"),
        ({"training_mode": "epoch", "num_train_epochs": float("inf")}, "recipe-out-of-range", "num_train_epochs"),
        ({"training_mode": "epoch", "max_steps": 3}, "recipe-conflict", "max_steps"),
        ({"training_mode": "step"}, "recipe-missing", "max_steps"),
        ({"training_mode": "step", "max_steps": 3, "max_tokens": 9}, "recipe-conflict", "max_tokens"),
        ({"training_mode": "token", "max_steps": 3}, "recipe-missing", "max_tokens"),
        ({"training_mode": "token", "max_tokens": 3, "num_train_epochs": 2}, "recipe-conflict", "num_train_epochs"),
        ({"training_mode": "infinite", "max_tokens": 3}, "recipe-conflict", "max_tokens"),
        ({"training_mode": "infinite", "num_train_epochs": 3}, "recipe-conflict", "num_train_epochs"),
        ({"data": {"train": "a", "streaming": True, "validation": 0.1}}, "recipe-conflict", "data.validation"),
        ({"data": {"train": "a", "streaming": True}, "num_train_epochs": 1.5}, "recipe-conflict", "num_train_epochs"),
        ({"data": {"train": "a", "block_size": 5000}}, "recipe-conflict", "data.block_size"),
        ({"num_train_epochs": float("nan")}, "recipe-wrong-type", "num_train_epochs"),
        ({"gradient_accumulation_steps": 4}, "recipe-missing", "gradient_accumulation_steps"),
        ({"global_batch_size": 16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, "recipe-conflict", "global_batch_size"),
        ({"device": "gpu"}, "recipe-out-of-range", "device"),
        ({"device": "cuda:x"}, "recipe-out-of-range", "device"),
        ({"learning_rate": -1e-3}, "recipe-out-of-range", "learning_rate"),
        ({"learning_rate": 10**400}, "recipe-wrong-type", "learning_rate"),
        ({"max_grad_norm": 0}, "recipe-out-of-range", "max_grad_norm"),
        ({"max_grad_norm": True}, "recipe-wrong-type", "max_grad_norm"),
        ({"packing": "false"}, "recipe-wrong-type", "packing"),
        ({"packing": 0}, "recipe-wrong-type", "packing"),
        ({"max_steps": "16"}, "recipe-wrong-type", "max_steps"),
        ({"max_steps": 16.7}, "recipe-wrong-type", "max_steps"),
        ({"max_steps": 16.0}, "recipe-wrong-type", "max_steps"),
        ({"seed": True}, "recipe-wrong-type", "seed"),
        ({"run_name": 3}, "recipe-wrong-type", "run_name"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_at_its_option(wrong, given_settings, code, where):
    error = wrong(**given_settings)
    assert (error.code, error.where) == (code, where)


@pytest.mark.parametrize(
    "given_settings",
    [
        {"max_steps": 5, "max_tokens": 100},
        {"num_train_epochs": 0, "max_steps": 5},
        {"num_train_epochs": float("inf"), "max_tokens": 5},
        {"num_train_epochs": float("inf")},
        {"training_mode": "infinite"},
        {"training_mode": "infinite", "num_train_epochs": float("inf")},
        {"training_mode": "epoch", "num_train_epochs": 0.5},
        {"training_mode": "step", "max_steps": 4},
        {"training_mode": "token", "max_tokens": 4},
        {"data": {"train": "a", "streaming": True, "validation": "b"}, "num_train_epochs": 2},
        {"data": {"train": "a", "streaming": True}, "num_train_epochs": 0.5, "max_steps": 3},
        {"data": {"train": "a", "block_size": 5000}, "max_tokens_per_device": "auto"},
        {**VALIDATED, "eval_steps": 5, "load_best_model_at_end": True, "eval_on_start": True, "max_eval_batches": 1},
        {"data": {"train": "a", "validation": "b"}, "eval_steps": 5},
        {"data": {"train": "a", "validation": 0.5}},
        {"device": "cuda:1"},
        {"learning_rate": "2e-4"},
        {"warmup_ratio": 1},
        {"warmup_steps": 100, "max_steps": 3},  # the first steps of a longer recipe
    ],
    ids=str,
)
def test_what_can_be_meant_is_taken(make, given_settings):
    make(**given_settings)


def test_the_batch_in_two_factors_sets_the_global_batch(make):
    assert make(per_device_train_batch_size=4, gradient_accumulation_steps=8).global_batch_size == 32
    assert make(per_device_train_batch_size=4).global_batch_size == 4
    agreeing = make(per_device_train_batch_size=4, gradient_accumulation_steps=8, global_batch_size=32)
    assert agreeing.global_batch_size == 32


def test_contradictions_are_refused_in_python_too():
    data = Data(train=[Source(path="a")])
    with pytest.raises(LuthierError) as caught:
        Recipe(model=Model(name_or_path="demo"), data=data, warmup_steps=1, warmup_ratio=0.1)
    assert caught.value.where == "warmup_ratio"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"model": "demo"}, {"model": {"name_or_path": "demo"}}),
        ({"data": "a.jsonl"}, {"data": {"train": [{"path": "a.jsonl"}]}}),
        ({"data": ["a.jsonl", {"path": "b"}]}, {"data": {"train": [{"path": "a.jsonl"}, {"path": "b"}]}}),
        ({"data": {"train": {"path": "a"}}}, {"data": {"train": [{"path": "a"}]}}),
        ({"data": {"train": "a", "validation": "b"}}, {"data": {"train": ["a"], "validation": [{"path": "b"}]}}),
        ({"data": {"train": "a", "validation": ["b"]}}, {"data": {"train": ["a"], "validation": [{"path": "b"}]}}),
        ({"adapter": "lora"}, {"adapter": {"name": "lora"}}),
        ({"optimizer": {"weight_decay": 0.3}}, {"optimizer": {"name": "adamw", "weight_decay": 0.3}}),
        ({"callbacks": "jsonl"}, {"callbacks": [{"name": "jsonl"}]}),
        ({"callbacks": {"name": "watch", "every": 2}}, {"callbacks": [{"name": "watch", "every": 2}]}),
        ({"learning_rate": 1}, {"learning_rate": 1.0}),
        ({"data": ("a", "b")}, {"data": {"train": ["a", "b"]}}),
    ],
    ids=str,
)
def test_short_forms_stand_for_long_ones(make, short, long):
    assert make(**short) == make(**long)


@pytest.mark.parametrize("mapping", [None, [], "recipe", 3])
def test_what_is_no_mapping_is_no_recipe(mapping):
    with pytest.raises(LuthierError) as caught:
        Recipe.from_dict(mapping)
    assert caught.value.code == "recipe-wrong-type"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "model",
                "data",
                "adapter",
                "callbacks",
                "optimizer",
                "seed",
                "lora_r",
                "osft",
                "warmup",
                "lora_target",
                "dtype",
                "betas",
                "beta1",
                "load_in_4bit",
                "quantization_bit",
                "optim",
                "eval_steps",
            ]
        ),
        json_values,
    )
)
def test_any_data_is_a_recipe_or_an_error_that_says_where(plugins, mapping):
    try:
        Recipe.from_dict({"model": "demo", "data": "d", **mapping}, plugins=plugins)
    except LuthierError as error:
        assert error.where
        assert error.remedy


def test_a_recipe_does_not_share_what_it_was_made_of(make):
    mapping = {"prompt": "question"}
    source = {"path": "a", "columns": mapping}
    recipe = make(data={"train": [source]}, lr_scheduler_kwargs=mapping)
    mapping["prompt"] = "changed"
    assert recipe.data.train[0].columns == {"prompt": "question"}
    assert recipe.lr_scheduler_kwargs == {"prompt": "question"}
    assert source["columns"] is mapping
