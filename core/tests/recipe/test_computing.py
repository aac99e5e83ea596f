"""Other tools' spellings of how a run computes, and contradictions among the options themselves."""

import pytest
from luthier import LuthierError
from luthier.recipe import from_mapping
from luthier.recipe.reading.computing_aliases import CHOICES, COMPUTING

LEAST = {"model": "demo", "data": "rows.jsonl"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"bf16": True, "fp16": False}, {"precision": "bf16"}),
        ({"bf16": False}, {"precision": "float32"}),
        ({"bf16": "auto"}, {"precision": "auto"}),
        ({"bf16": "full"}, {"precision": "pure_bf16"}),
        ({"fp16": True}, {"precision": "fp16"}),
        ({"pure_bf16": True}, {"precision": "pure_bf16"}),
        ({"mixed_precision": "no"}, {"precision": "float32"}),
        ({"use_gradient_checkpointing": "unsloth"}, {"gradient_checkpointing": "offload"}),
        ({"enable_activation_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"disable_gradient_checkpointing": False}, {"gradient_checkpointing": True}),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"gradient_checkpointing": True}),
        ({"use_cpu": True}, {"device": "cpu"}),
        ({"loraplus_lr_ratio": 16.0}, {"lr_multipliers": {r"\.lora_B\.": 16.0}}),
        ({"layer_decay": 0.9}, {"layerwise_lr_decay": 0.9}),
    ],
)  # fmt: skip
def test_other_tools_settings_mean_ours_and_say_so(theirs, ours):
    reading = from_mapping(LEAST | theirs)
    assert reading.recipe == from_mapping(LEAST | ours).recipe
    assert len(reading.notes) == len(theirs.keys() - ours.keys())


@pytest.mark.parametrize("alias", [*CHOICES, "gradient_checkpointing_kwargs"])
def test_a_value_that_no_tool_means_is_refused(alias):
    with pytest.raises(LuthierError) as caught:
        COMPUTING[alias]("perhaps")
    assert caught.value.where == alias
    assert "perhaps" in str(caught.value)


def test_one_is_not_true():
    with pytest.raises(LuthierError):
        COMPUTING["bf16"](1)


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"lr_multipliers": {"lora_(": 2.0}}, "recipe-wrong-type", ("lr_multipliers",)),
        ({"lr_multipliers": {"lora_A": -1.0}}, "recipe-out-of-range", ("lr_multipliers.lora_A",)),
        ({"layerwise_lr_decay": 1.5}, "recipe-out-of-range", ("layerwise_lr_decay",)),
        ({"precision": "bfloat16"}, "recipe-wrong-type", ("'pure_bf16'",)),
        ({"num_threads": 0}, "recipe-out-of-range", ("num_threads",)),
    ],
)
def test_settings_that_mean_nothing_are_refused_where_they_stand(settings, code, says):
    with pytest.raises(LuthierError) as caught:
        from_mapping(LEAST | settings)
    assert caught.value.code == code
    assert all(fact in str(caught.value) for fact in says)
