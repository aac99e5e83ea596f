"""Targets: PEFT's matching, and errors that show what the model has."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model
from luthier_lora import Dora, Lora
from luthier_lora.adapter import LoraAdapter
from luthier_lora.targets import default_names, find_targets, matches

LLAMA = tiny_model()
NAMES = [name for name, _ in LLAMA.named_modules() if name]


def found(**options):
    return find_targets(LLAMA, Lora(**options)).layers


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(NAMES + ["q_proj", "mlp.up_proj", "proj", "0.mlp.up_proj"]), min_size=1), st.booleans())
def test_matching_is_pefts(patterns, as_expression):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    wanted = f".*({'|'.join(map(re.escape, patterns))})" if as_expression else patterns
    config = LoraConfig(target_modules=wanted)
    for name in NAMES:
        assert matches(wanted, name) == bool(check_target_module_exists(config, name))


def test_list_matches_the_end_of_a_name_at_a_dot():
    assert len(found(target_modules=["up_proj"])) == 2
    assert found(target_modules=["1.mlp.up_proj"]) == ("model.layers.1.mlp.up_proj",)
    assert found(target_modules=["lm_head"]) == ("lm_head",)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (Lora(target_modules=["lm_head"]), "target_modules"),
        (Dora(target_modules="lm_head"), "target_modules"),
        (Lora(target_modules=["lm_head", "q_proj"], exclude_modules=["q_proj"]), "target_modules"),
        (Lora(target_modules=[], target_parameters=["lm_head.weight"], lora_dropout=0.0), "target_parameters"),
    ],
)
def test_the_head_alone_is_refused_by_name_and_a_finished_adapter_of_it_is_opened(options, option, context):
    with expect_error("model-target", option, "lm_head"):
        LoraAdapter(options).attach(tiny_model(), context())
    adapter = LoraAdapter(options)
    adapter.attach(tiny_model(), context(purpose="open"))
    assert adapter.targets.modules == ["lm_head"]


def test_string_matches_the_whole_name():
    assert found(target_modules=r"model\.layers\.0\..*(q|k)_proj") == tuple(
        f"model.layers.0.self_attn.{x}_proj" for x in "qk"
    )
    with pytest.raises(Exception, match="model-target"):
        found(target_modules="q_proj")


def test_expression_that_reaches_containers_takes_the_layers_in_them():
    assert len(found(target_modules=r".*self_attn.*")) == 8


def test_excluded_modules_are_left_out():
    assert found(target_modules="all-linear", exclude_modules=r".*layers\.1.*|.*mlp.*") == tuple(
        f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"
    )
    assert len(found(exclude_modules=["v_proj"])) == 2


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (["q_proj", "k_proj", "v_proj", "qkv_proj"], ["q_proj", "v_proj"]),
        (["query", "key", "value"], ["query", "value"]),
        (["Wqkv", "out_proj"], ["Wqkv"]),
        (["q_proj", "kv_a_proj_with_mqa", "kv_b_proj"], ["q_proj", "kv_b_proj"]),
        (["q_a_proj", "q_b_proj", "kv_b_proj"], ["q_b_proj", "kv_b_proj"]),
    ],
)
def test_default_prefers_separate_projections(ends, expected):
    assert default_names([f"layers.0.attn.{end}" for end in ends]) == expected


def test_default_without_attention_lists_the_layers(refused):
    error = refused(default_names, ["layers.0.mixer.in_proj", "layers.0.mixer.out_proj"])
    assert error.code == "model-target"
    assert "in_proj" in str(error) and "out_proj" in str(error)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"target_modules": ["q_porj"]}, ("q_proj",)),
        ({"target_modules": ["q_proj", "dwn_proj"]}, ("down_proj",)),
        ({"target_modules": r".*\.attention\.q_proj"}, ("q_proj",)),
        ({"target_modules": ["query_key_value"]}, ("q_proj",)),
        ({"target_modules": "q_proj"}, ("write a list: [q_proj]",)),
        ({"target_modules": "all_linear"}, ("'all-linear'",)),
        ({"target_modules": ["self_attn"]}, ("target_modules", "q_proj", "k_proj", "v_proj", "o_proj")),
        ({"target_modules": ["embed_tokens"]}, ("is a Embedding",)),
        ({"target_modules": ["norm"]}, ("is a LlamaRMSNorm",)),
        ({"exclude_modules": ["o_porj"]}, ("o_proj",)),
        ({"exclude_modules": ".*_proj"}, ("exclude_modules",)),
        ({"target_parameters": ["mlp.experts.down"], "lora_dropout": 0.0}, ("down_proj",)),
    ],
)
def test_pattern_that_matches_nothing_shows_near_misses(refused, options, hint):
    error = refused(find_targets, LLAMA, Lora(**options))
    assert error.code == "model-target"
    assert all(fact in str(error) for fact in hint)
    assert error.where == next(iter(options))


def test_experts_targeted_as_a_layer_are_sent_to_target_parameters(refused):
    error = refused(find_targets, tiny_model("mixtral"), Lora(target_modules=["experts"]))
    assert all(name in error.remedy for name in ("target_parameters", "gate_up_proj", "down_proj"))


def test_error_names_the_one_entry_of_a_list_that_is_wrong(refused):
    assert refused(find_targets, LLAMA, Lora(target_modules=["q_proj", "vproj"])).found == "vproj"


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_broken_expression_is_an_error_with_its_place(refused, option):
    error = refused(find_targets, LLAMA, Lora(**{option: "q_proj("}))
    assert (error.code, error.where) == ("recipe-wrong-type", option)


def test_nothing_to_train_is_an_error(refused):
    assert refused(find_targets, LLAMA, Lora(target_modules=[])).code == "train-nothing"


def test_parameters_with_dropout_are_refused_before_any_model_is_touched(refused):
    error = refused(LoraAdapter, Lora(target_parameters=["experts.down_proj"], lora_dropout=0.05))
    assert error.code == "recipe-conflict"
    assert "lora_dropout" in str(error)


def test_weight_named_as_layer_and_as_parameter_is_refused(refused):
    options = Lora(lora_dropout=0.0, target_modules=["q_proj"], target_parameters=["0.self_attn.q_proj.weight"])
    assert refused(find_targets, LLAMA, options).code == "recipe-conflict"


@pytest.mark.parametrize("cls", [Lora, Dora])
@pytest.mark.parametrize("options", [{"r": 0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1}])
def test_options_out_of_range_are_refused(refused, cls, options):
    assert refused(lambda: cls(**options)).code == "recipe-out-of-range"


def test_dora_has_no_target_parameters():
    with pytest.raises(TypeError):
        Dora(target_parameters=["experts"])
