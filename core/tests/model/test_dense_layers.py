"""Which layers of a model a quantizer takes, and which models it refuses."""

import attrs
import luthier
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.errors import LuthierError
from luthier.testing import expect_error
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D


class Scaled(nn.Linear):
    """A layer that computes something else than its weight says."""


def blocks(**more):
    model = nn.Module()
    model.body = nn.ModuleDict({"proj": nn.Linear(4, 4), "old": Conv1D(4, 4), "gate": nn.Linear(4, 2)})
    model.body["scaled"] = Scaled(4, 4)
    model.norm, model.head = nn.LayerNorm(4), nn.Linear(4, 9)
    for name, layer in more.items():
        model.add_module(name, layer)
    return model


def chosen(model, *options):
    return set(luthier.choose_dense_layers(model, "mine", *options))


def test_dense_layers_of_exactly_two_kinds_are_taken_and_an_output_head_is_not():
    model = blocks()
    assert chosen(model, []) == {"body.proj", "body.old", "body.gate", "head"}
    model.get_output_embeddings = lambda: model.head
    assert chosen(model, []) == {"body.proj", "body.old", "body.gate"}


def test_what_is_named_stays_exact_by_the_last_word_or_with_all_that_lies_in_it():
    model = blocks(gates=nn.Linear(4, 4))
    assert chosen(model, [], ["gate", "old"]) == {"body.proj", "gates", "head"}
    assert chosen(model, ["body"]) == {"gates", "head"}
    assert chosen(model, ["body.proj", "head"]) == {"body.old", "body.gate", "gates"}


def test_a_layer_in_two_places_is_taken_in_both_and_a_shared_weight_is_left():
    same, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    model = blocks(one=same, two=same, three=tied, four=nn.Linear(4, 4))
    model.four.weight = tied.weight
    assert {"one", "two"} == chosen(model, ["body", "head"])


@given(entry=st.text("abcdefgh_.", min_size=1, max_size=9))
def test_an_entry_that_names_no_module_is_told_by_its_option(entry):
    with pytest.raises(LuthierError) as caught:
        chosen(blocks(), ["proj", f"x{entry}"])
    assert (caught.value.code, caught.value.where) == ("model-target", "mine.skip_modules")


def test_the_nearest_module_is_named():
    with expect_error("model-target", "mine.skip_modules", "q_proj"):
        chosen(tiny_model(), ["q_porj"])


@pytest.mark.parametrize("config", [{"quant_method": "bitnet"}, type("Own", (), {"quant_method": "bitnet"})()])
def test_a_quantized_checkpoint_is_refused_with_its_method(config):
    model = tiny_model()
    model.config.quantization_config = config
    with pytest.raises(LuthierError, match="bitnet") as caught:
        chosen(model, [])
    assert caught.value.code == "part-unsupported"


class Halved(nn.Module):
    """The layer of a quantizer that halves weights."""

    def __init__(self, layer):
        super().__init__()
        self.half = layer.weight.detach() / 2


def replaced(model, **given):
    told = attrs.evolve(context(tiny_model()), **given)
    return luthier.replace_dense_layers(model, told, "mine", ["gate"], Halved, Halved, "mine:wrong")


def test_each_chosen_layer_is_replaced_once_and_a_second_call_changes_nothing():
    same = nn.Linear(4, 4)
    model = blocks(one=same, two=same)
    assert replaced(model) == 4  # of five places
    assert model.one is model.two and torch.equal(model.one.half, same.weight / 2)
    assert type(model.body["old"]) is type(model.head) is Halved and type(model.body["gate"]) is nn.Linear
    before = list(model.modules())
    assert replaced(model) == 0 and list(model.modules()) == before


def test_a_model_of_which_nothing_is_replaced_is_refused():
    model = nn.Module()
    model.gate = nn.Linear(4, 4)
    with pytest.raises(LuthierError) as caught:
        replaced(model)
    assert (caught.value.code, caught.value.where) == ("part-unsupported", "Module")


def test_weights_are_read_only_where_they_have_values_and_a_refusal_leaves_the_model():
    model = blocks()
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(LuthierError) as caught:
        replaced(model)
    assert (caught.value.code, caught.value.where) == ("mine:wrong", "head") and type(model.head) is nn.Linear
    assert replaced(model, has_values=False) == 3


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_the_first_weight_that_is_no_number_is_told_by_its_path(wrong):
    layers = luthier.choose_dense_layers(blocks(), "mine", ["gate"])
    luthier.check_finite_weights(layers, "mine:wrong")
    layers["body.old"].weight.data[3, 1] = wrong
    with pytest.raises(LuthierError) as caught:
        luthier.check_finite_weights(layers, "mine:wrong")
    assert (caught.value.code, caught.value.where) == ("mine:wrong", "body.old")
