"""The options are PEFT's: every field is offered with its type, default and help, or left out with a reason that holds."""

import copy
import dataclasses
import pickle
import typing
import warnings
from typing import Literal

import attrs
import luthier
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.testing import expect_error, options_of
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from luthier_peft import LoraConfig, omitted
from luthier_peft.adapter import build
from luthier_peft.methods import METHODS
from luthier_peft.options import config_class, default_of, options_class, options_for, reason_omitted, to_config
from peft import PeftModel, get_peft_model_state_dict

from .conftest import IDS, World, distance, fitting, outputs

# what else has to be set for PEFT to come to an option
COMPANIONS = {
    ("tinylora", "init_v_bound"): {"init_weights": "uniform"},
    ("supertuning", "lora_alpha"): {"r": 2},
    ("supertuning", "lora_dropout"): {"r": 2},
    ("adalora", "orth_reg_weight"): None,  # read by our own penalty, tested with AdaLoRA
}
WHOLE = [(method, field) for method in METHODS for field in dataclasses.fields(config_class(method))]


def mentions_dataclass(hint):
    return dataclasses.is_dataclass(hint) or any(mentions_dataclass(a) for a in typing.get_args(hint))


@pytest.mark.parametrize("method", METHODS)
def test_every_field_is_offered_as_it_is_or_left_out_with_a_reason(method):
    made = {f.name: f for f in attrs.fields(options_class(method))}
    for field in dataclasses.fields(config_class(method)):
        reason = reason_omitted(method, field)
        assert (field.name in made) == (reason is None)
        if reason is None:
            default = made[field.name].default
            default = default.factory() if isinstance(default, attrs.Factory) else default
            assert default == default_of(field) and type(default) is type(default_of(field))
            wanted = " ".join(str(field.metadata["help"]).split())
            assert made[field.name].metadata["luthier.option"].help == wanted
    assert set(made) <= {f.name for f in dataclasses.fields(config_class(method))}


@pytest.mark.parametrize("method", METHODS)
def test_defaults_make_the_configuration_that_peft_makes(method):
    fixed = {"total_step": 10} if method == "adalora" else {}
    ours = to_config(options_class(method)(), **fixed)
    assert ours == config_class(method)(task_type="CAUSAL_LM", **fixed)


def test_nested_configurations_are_the_only_types_left_out():
    for method, field in WHOLE:
        if reason_omitted(method, field) == omitted.NESTED:
            assert mentions_dataclass(typing.get_type_hints(config_class(method))[field.name])
        assert reason_omitted(method, field) != omitted.UNWRITABLE


def test_every_omission_names_something_that_peft_has():
    fields = {(method, field.name) for method, field in WHOLE}
    assert {name for _, name in fields} >= set(omitted.EVERYWHERE)
    assert {(m, name) for m, names in omitted.OF_METHOD.items() for name in names} <= fields
    for (method, name), choices in omitted.CHOICES.items():
        hint = typing.get_type_hints(config_class(method))[name]
        literals = {c for m in typing.get_args(hint) for c in typing.get_args(m)}
        assert set(choices) <= literals


def read_by_peft(method, **changes):
    """The fields of a method's configuration that PEFT reads while it attaches, trains, saves and merges."""
    seen, watching = set(), [False]

    class Watched(config_class(method)):
        def __getattribute__(self, name):
            if watching[0]:
                seen.add(name)
            return object.__getattribute__(self, name)

        def to_dict(self):  # saving looks at every field
            watching[0], before = False, watching[0]
            try:
                return super().to_dict()
            finally:
                watching[0] = before

    Watched.__name__ = config_class(method).__name__
    plain = to_config(fitting(method, **changes), **({"total_step": 10} if method == "adalora" else {}))
    given = {f.name: copy.deepcopy(getattr(plain, f.name)) for f in dataclasses.fields(plain)}
    config = Watched(**given)
    watching[0] = True
    handle = PeftModel(tiny_model(), config)
    handle(input_ids=IDS, labels=IDS).loss.backward()
    if method == "adalora":
        handle.base_model.update_and_allocate(1)
    get_peft_model_state_dict(handle, save_embedding_layers=False)
    if METHODS[method].mergeable:
        handle.merge_and_unload()
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_peft_reads_every_option_offered_and_none_that_is_left_out_as_unread(method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = read_by_peft(method)
        for field in attrs.fields(options_class(method)):
            companions = COMPANIONS.get((method, field.name), {})
            if companions:
                assert field.name not in seen and field.name in read_by_peft(method, **companions)
            elif companions is not None:
                assert field.name in seen, f"{field.name} would be accepted and do nothing"
    unread = {n for n, reason in omitted.OF_METHOD.get(method, {}).items() if reason.startswith(omitted.UNREAD)}
    assert not unread & seen - {"alpha_pattern"}  # of which PEFT's common base only warns


@pytest.mark.parametrize("choice", ["olora", "pissa", "pissa_niter_4"])
def test_the_initialisations_left_out_do_change_the_base(choice):
    model = tiny_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    PeftModel(model, config_class("lora")(init_lora_weights=choice, target_modules=["q_proj"]))
    changed = [n for n, t in model.state_dict().items() if not t.equal(before.get(n.replace(".base_layer", ""), t))]
    assert changed


@pytest.mark.parametrize("choice", [True, "gaussian", "orthogonal", "mica"])
def test_the_initialisations_offered_leave_the_base_alone(choice):
    world = World(fitting("lora", init_lora_weights=choice))
    assert distance(world.outputs(), outputs(world.base)) < 1e-5
    world.train(2)
    with world.part.disabled():
        assert world.outputs().equal(outputs(world.base))


@pytest.mark.parametrize("choice", ["pissa", "loftq", "nonsense", 3])
def test_a_choice_that_is_left_out_is_refused(choice):
    with pytest.raises(LuthierError, match="LoraConfig.init_lora_weights"):
        LoraConfig(init_lora_weights=choice)


def test_bias_offers_the_three_values_that_pefts_tuners_know():
    hint = typing.get_type_hints(options_class("vera"))["bias"]
    assert hint == Literal["none", "all", "vera_only"]
    with pytest.raises(LuthierError, match="vera_only"):
        options_class("vera")(bias="lora_only")


def test_the_same_class_is_given_each_time_and_it_pickles():
    assert options_for("peft.vera") is options_class("vera") is options_for("peft.vera")
    assert pickle.loads(pickle.dumps(LoraConfig(r=3))) == LoraConfig(r=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_options_are_a_configuration_or_a_refusal_in_pefts_words(data):
    method = data.draw(st.sampled_from(sorted(METHODS)))
    options = data.draw(options_of(options_class(method)))
    fixed = {"total_step": 10} if method == "adalora" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = to_config(options, **fixed)
        except LuthierError as error:
            assert error.code == "recipe-out-of-range" and "PEFT" in error.problem
            return
    assert config.r == options.r if hasattr(options, "r") else config.peft_type.value.lower() == method


def test_a_refusal_of_pefts_comes_before_any_model_and_names_the_part():
    with expect_error("recipe-out-of-range", "adapter peft.lora", "`layers_to_transform`") as caught:
        build(LoraConfig(target_modules="q_proj", layers_to_transform=[1]))
    assert caught.value.code == "recipe-out-of-range"


def test_a_warning_of_peft_about_its_own_patterns_is_no_error_and_one_about_given_patterns_is():
    arguments = {
        "model": tiny_model("mixtral"),
        "tokenizer": tiny_tokenizer(),
        "data": [{"prompt": "a", "completion": "b"}],
    }
    adapter = {"name": "peft.lora", "r": 2, "target_modules": "all-linear"}
    assert luthier.plan(**arguments, adapter=adapter).parameters
    with pytest.raises(LuthierError, match="no_such_layer"):
        luthier.plan(**arguments, adapter={**adapter, "rank_pattern": {"no_such_layer": 4}})
