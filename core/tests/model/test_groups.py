"""Rates by depth and by name: which parameter gets which, and patterns that are in no name."""

import json

import attrs
import luthier
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.builtin.full import FullTuning
from luthier.errors import LuthierError
from luthier.model.weights.layers import decoder_layers, layer_depths
from luthier.model.weights.parameter_groups import describe_groups, scale_groups
from luthier.plugins.records import NoOptions
from luthier.testing.contexts import context
from luthier.testing.worlds import ARCHITECTURES, tiny_model
from torch import nn


def groups_of(model):
    adapter = FullTuning(NoOptions())
    adapter.attach(model, context(model))
    return adapter.groups()


def rates(found):
    return {name: group.lr_scale for group in found for name in group.names}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layers_of_every_architecture_are_found_in_order(architecture):
    model = tiny_model(architecture, **({"n_layer": 3} if architecture == "gpt2" else {"num_hidden_layers": 3}))
    assert list(layer_depths(model).values()) == [0, 1, 2]
    assert len({type(layer) for layer in decoder_layers(model)}) == 1


def test_layers_that_transformers_does_not_mark_are_the_outermost_list():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

    assert list(layer_depths(Body())) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_layers_rate_decays_with_its_distance_from_the_head(architecture):
    model = tiny_model(architecture)
    found = rates(scale_groups(groups_of(model), model, decay=0.5, multipliers={}))
    for name, scale in found.items():
        if ".0." in name.replace("experts.0", ""):
            assert scale == 0.5, name
        elif "embed" in name or "wte" in name or "wpe" in name:
            assert scale == 0.25, name
        elif ".1." in name or "norm" in name or "ln_f" in name or "head" in name:
            assert scale == 1.0, name


@settings(deadline=None, max_examples=20)
@given(
    decay=st.sampled_from([1.0, 0.9, 0.0]),
    patterns=st.dictionaries(st.sampled_from(["q_proj", r"layers\.0\.", "norm", "weight$"]), st.floats(0.1, 9.0), max_size=3),
)  # fmt: skip
def test_no_parameter_is_lost_doubled_or_moved_from_its_role(decay, patterns):
    model = tiny_model()
    before = groups_of(model)
    after = scale_groups(before, model, decay=decay, multipliers=patterns)
    roles = {name: (group.role, group.weight_decay) for group in before for name in group.names}
    pairs = [(n, id(p)) for g in after for n, p in zip(g.names, g.parameters, strict=True)]
    assert sorted(pairs) == sorted((n, id(p)) for g in before for n, p in zip(g.names, g.parameters, strict=True))
    assert all(roles[name] == (group.role, group.weight_decay) for group in after for name in group.names)


def test_every_pattern_that_is_found_counts_and_the_adapters_own_scale_stays():
    model = tiny_model()
    own = [attrs.evolve(group, lr_scale=3.0) for group in groups_of(model)]
    found = rates(scale_groups(own, model, decay=0.5, multipliers={"q_proj": 4.0, r"layers\.0": 0.5}))
    assert found["model.layers.0.self_attn.q_proj.weight"] == 3.0 * 0.5 * 4.0 * 0.5
    assert found["model.layers.1.self_attn.q_proj.weight"] == 3.0 * 4.0
    assert found["model.layers.1.self_attn.k_proj.weight"] == 3.0


def test_nothing_asked_for_leaves_the_groups_as_they_are():
    model = tiny_model()
    before = groups_of(model)
    assert scale_groups(before, model, decay=1.0, multipliers={}) == before


def test_a_pattern_in_no_name_is_refused_with_near_misses():
    model = tiny_model()
    with pytest.raises(LuthierError) as caught:
        scale_groups(groups_of(model), model, decay=1.0, multipliers={"q_porj": 2.0})
    assert (caught.value.code, caught.value.where) == ("model-target", "lr_multipliers")
    assert "model.layers.*.self_attn.q_proj.weight" in caught.value.remedy


def test_the_rates_reach_the_steps(train, tmp_path):
    """Plain gradient descent: with a rate of 0 a weight stays, with twice the rate it goes twice as far."""
    shared = {"optimizer": "sgd", "max_steps": 1, "lr_scheduler_type": "constant", "save_final": False}
    plain, changed = (
        train(**shared, output_dir=tmp_path / name, lr_multipliers=given)
        for name, given in (("a", {}), ("b", {"q_proj": 0.0, "v_proj": 2.0}))
    )
    begun = tiny_model().state_dict()
    moved = [{n: p.detach() - begun[n] for n, p in run.model.named_parameters()} for run in (plain, changed)]
    for name in moved[0]:
        factor = 0.0 if "q_proj" in name else 2.0 if "v_proj" in name else 1.0
        torch.testing.assert_close(moved[1][name], factor * moved[0][name], rtol=1e-3, atol=1e-7)


def test_the_plan_shows_the_groups(model_folder, rows):
    found = luthier.plan(model=str(model_folder), data=rows, layerwise_lr_decay=0.5, lr_multipliers={"norm": 3.0})
    assert {g["lr_scale"] for g in found.groups} == {0.25, 0.5, 1.0, 1.5, 3.0}
    assert sum(g["parameters"] for g in found.groups) == found.parameters["all"]["trainable"]


def test_a_description_is_plain_data():
    model = tiny_model()
    assert json.loads(json.dumps(describe_groups(groups_of(model)))) == describe_groups(groups_of(model))
