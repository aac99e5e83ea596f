"""Copies of the base's embedding and head in an adapter's file: dropped if they are the model's, refused by name if not."""

import pytest
import torch
from luthier import drop_base_copies, place_token_rows
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model

OWN = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)}


def copies(model, place=""):
    both = {"lm_head": model.lm_head, "model.embed_tokens": model.get_input_embeddings()}
    return {f"base_model.model.{path}.{place}weight": module.weight.detach().clone() for path, module in both.items()}


@pytest.mark.parametrize("place", ["", "base_layer.", "token_adapter.base_layer."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_model_has_already_is_dropped_wherever_a_wrapper_of_peft_keeps_it(place, wrapped):
    model = tiny_model()
    given = {**OWN, **copies(model, place)}
    if wrapped:
        place_token_rows(model, [3], own_head=True)
    assert drop_base_copies(model, given, OWN.keys(), "file") == OWN


def test_what_the_adapter_has_itself_stays():
    model = tiny_model()
    given = {name: tensor + 1 for name, tensor in copies(model).items()}
    assert drop_base_copies(model, given, given.keys(), "file") == given


@pytest.mark.parametrize("has_numbers", [True, False])
def test_another_number_of_rows_is_refused_with_both_and_how_to_resize(has_numbers):
    model = tiny_model()
    given = {name: torch.zeros(324, 32) for name in copies(model)}
    model = model if has_numbers else model.to("meta")
    with expect_error("artifact-mismatch", "file", "[324, 32]", "[320, 32]", "resize_token_embeddings(324)"):
        drop_base_copies(model, given, (), "file")


def test_other_numbers_are_refused_by_the_weight_s_name_where_the_model_has_any():
    model = tiny_model()
    given = {name: tensor + 1 for name, tensor in copies(model).items()}
    with expect_error("artifact-mismatch", "file", "base_model.model.model.embed_tokens.weight", "modules_to_save"):
        drop_base_copies(model, given, (), "file")
    assert drop_base_copies(model.to("meta"), given, (), "file") == {}
