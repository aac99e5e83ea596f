"""Ranks chosen from the weights, and scales that are learnt."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.testing.worlds import tiny_model
from luthier_lora import Dora, Lora, options_of
from luthier_lora.adapter import LoraAdapter
from luthier_lora.merging import wrappers
from luthier_lora.ranks import allot_ranks, count_energy
from safetensors.torch import load_file

ENERGIES = st.lists(st.floats(0.0, 100.0), min_size=1, max_size=8).map(lambda values: sorted(values, reverse=True))
LAYERS = st.dictionaries(st.sampled_from("abcdef"), st.tuples(ENERGIES, st.integers(1, 50)), min_size=1)


@given(ENERGIES, st.floats(0, 1), st.floats(0, 1))
def test_a_rank_is_the_fewest_that_hold_the_share_and_rises_with_it(values, share, other):
    count = count_energy(values, share)
    assert 1 <= count <= len(values)
    assert sum(values[:count]) >= share * sum(values) * (1 - 1e-12)
    assert count == 1 or sum(values[: count - 1]) < share * sum(values)
    assert (count <= count_energy(values, other)) or share >= other


@given(LAYERS, st.floats(0, 1), st.integers(1, 8), st.integers(0, 500))
def test_a_budget_is_kept_and_only_takes_away(layers, share, most, spare):
    energies = {name: values for name, (values, _) in layers.items()}
    costs = {name: cost for name, (_, cost) in layers.items()}
    free = allot_ranks(energies, costs, share=share, most=most, budget=None)
    budget = sum(costs.values()) + spare
    ranks = allot_ranks(energies, costs, share=share, most=most, budget=budget)
    spent = sum(rank * costs[name] for name, rank in ranks.items())
    assert spent <= budget
    assert all(1 <= ranks[name] <= free[name] <= most for name in layers)
    wanting = [name for name in layers if ranks[name] < free[name]]
    assert all(costs[name] > budget - spent for name in wanting)  # nothing more would fit


def energy_rank(weight, share):
    squares = torch.linalg.svdvals(weight.detach()).square().cumsum(0)
    return int((squares < share * squares[-1]).sum()) + 1


@pytest.mark.parametrize("kind", [Lora, Dora])
def test_layers_get_the_ranks_of_their_weights_and_peft_reads_them(attached, logits, tmp_path, kind):
    import peft

    options = kind(r=24, rank_energy=0.6, lora_dropout=0.0, target_modules="all-linear", rank_pattern={"0.*up_proj": 2})
    model, adapter = attached(options, shake=0.05)
    weights = dict(tiny_model().named_parameters())
    for path, layer in wrappers(model).items():
        expected = 2 if path.endswith("0.mlp.up_proj") else min(24, energy_rank(weights[f"{path}.weight"], 0.6))
        assert layer.lora_A.weight.shape[0] == expected
    assert len({layer.lora_A.weight.shape[0] for layer in wrappers(model).values()}) > 2
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-4, rtol=1e-4)
    again, other = attached(options_of(tmp_path), shake=0)
    other.load(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_budget_bounds_the_parameters(attached, refused, context):
    _, adapter = attached(Lora(r=16, rank_budget=5000, target_modules="all-linear"))
    size = sum(p.numel() for group in adapter.groups() for p in group.parameters)
    assert 4500 < size <= 5000
    error = refused(LoraAdapter(Lora(rank_budget=100)).attach, tiny_model(), context())
    assert (error.code, error.where) == ("recipe-out-of-range", "rank_budget")


def test_the_ranks_are_a_decision_of_the_run(context):
    asked = []

    def decide(name, function, bound):
        asked.append((name, bound))
        return {key: 1 for key in bound}

    adapter = LoraAdapter(Lora(rank_energy=0.9))
    adapter.attach(tiny_model(), attrs.evolve(context(), decide=decide))
    ((name, bound),) = asked
    assert name == "lora.ranks"
    assert set(bound.values()) == {8}
    assert set(adapter.options.rank_pattern.values()) == {1}


@pytest.mark.parametrize("kind", [Lora, Dora])
def test_a_learnt_scale_trains_is_merged_and_is_within_b_in_pefts_files(
    attached, context, logits, tokens, tmp_path, kind
):
    import peft

    model, adapter = attached(kind(learn_scale=True, lora_dropout=0.0), shake=0.3)
    scales = [p for group in adapter.groups() for n, p in zip(group.names, group.parameters) if "lora_scale" in n]
    assert len(scales) == len(wrappers(model))
    model(tokens, labels=tokens).loss.backward()
    assert all(scale.grad.any() for scale in scales)
    before = logits(model)
    assert all(group.weight_decay == 0.0 for group in adapter.groups() if group.names[0].endswith("lora_scale"))
    adapter.save(tmp_path)
    assert not any("lora_scale" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(theirs), before, atol=1e-4, rtol=1e-4)
    for options in (options_of(tmp_path), kind(learn_scale=True, lora_dropout=0.0)):
        again, other = attached(options, shake=0.1)
        other.load(tmp_path)
        torch.testing.assert_close(logits(again), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(adapter.merge(context())), before, atol=1e-4, rtol=1e-4)


def test_a_learnt_scale_of_a_parameter_is_refused(refused):
    options = Lora(lora_dropout=0.0, learn_scale=True, target_parameters=["experts.down_proj"])
    assert refused(LoraAdapter, options).where == "learn_scale"
