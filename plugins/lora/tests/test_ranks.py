"""Ranks chosen from the weights, and scales that are learnt."""

import attrs
import luthier
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.model.attention import install_attention
from luthier.testing.contexts import context as engine_context
from luthier.testing.worlds import save_tiny_model, tiny_model
from luthier_lora import Dora, Lora, gradients, options_of
from luthier_lora.adapter import LoraAdapter
from luthier_lora.merging import wrappers
from luthier_lora.ranks import count_energy, fit_budget
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
    free = {name: min(most, count_energy(values, share)) for name, values in energies.items()}
    budget = sum(costs.values()) + spare
    ranks = fit_budget(free, energies, costs, budget)
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


@pytest.mark.parametrize(("options", "most"), [({"rank_budget": 2000}, 2000), ({"rank_energy": 0.5}, 2 * 2 * 8 * 64)])
def test_a_plan_takes_the_largest_ranks_that_may_be_chosen_and_says_so(tmp_path, options, most):
    adapter = {"name": "lora", "r": 8, "target_modules": ["q_proj", "o_proj"], **options}
    rows = [{"prompt": "one", "completion": "two"}] * 4
    base = save_tiny_model(tmp_path / "base")
    plan = luthier.plan(model=str(base), data=rows, adapter=adapter, output_dir=tmp_path / "run")
    assert most * 0.9 < plan.parameters["all"]["trainable"] <= most
    assert any(note.startswith("lora.ranks ") for note in plan.notes)
    run = luthier.train(model=str(base), data=rows, adapter=adapter, output_dir=tmp_path / "run", max_steps=1)
    assert sum(p.numel() for p in load_file(run.artifact / "adapter_model.safetensors").values()) <= most


def summed_gradients(model, batches, names):
    """The gradients of minus the weighted log-likelihood of the labels, by autograd on the weights themselves."""
    model.requires_grad_(True).zero_grad()
    for batch in batches:
        for ids, labels, weights in zip(*(part.split(batch.lengths.tolist()) for part in (
                batch.input_ids, batch.labels, batch.token_weights)), strict=True):  # fmt: skip
            found = model(ids[None]).logits[0, :-1].log_softmax(-1)
            kept = labels[1:] != -100
            chosen = found[kept].gather(-1, labels[1:][kept][:, None])[:, 0]
            (-(chosen * weights[1:][kept]).sum()).backward()
    return {name: model.get_submodule(name).weight.grad for name in names}


@pytest.mark.parametrize("held", [2**31, 1], ids=["together", "one by one"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradients_of_layers_are_those_of_autograd_and_leave_no_trace(monkeypatch, held, architecture):
    monkeypatch.setattr(gradients, "HELD", held)
    model = tiny_model(architecture)
    frozen = model.model.norm.weight.requires_grad_(False)
    names = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and "layers" in name]
    layers = {name: model.get_submodule(name) for name in names}
    install_attention(model)
    around, told = engine_context(model), []
    energies = gradients.gradient_energies(model, layers, 2, around, lambda: told.append(1))
    assert len(told) == len(names) == len(energies)
    assert all(p.grad is None and p.requires_grad == (p is not frozen) for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules()) and model.training == tiny_model().training
    expected = summed_gradients(tiny_model(architecture).eval(), around.batches(2), names)
    for name, values in energies.items():
        squares = torch.linalg.svdvals(expected[name]).double().square()
        torch.testing.assert_close(torch.tensor(values).double(), squares, rtol=1e-3, atol=1e-3 * float(squares[0]))


def ranks_of(options, change=lambda model: None):
    model = tiny_model()
    change(model)
    install_attention(model)
    LoraAdapter(options).attach(model, engine_context(model))
    return {name: layer.lora_A.weight.shape[0] for name, layer in wrappers(model).items()}


def test_ranks_by_gradient_go_where_the_rows_would_change_the_model(refused):
    options = Lora(r=16, rank_budget=3000, rank_gradient=1, target_modules="all-linear")

    def silence(model):  # what a layer gives has no part in the loss, so that it gets no gradient
        model.model.layers[1].mlp.down_proj.weight.data.zero_()

    ranks, silenced = ranks_of(options), ranks_of(options, silence)
    costs = {name: sum(layer.weight.shape) for name, layer in tiny_model().named_modules() if name in ranks}
    assert 2900 < sum(ranks[name] * cost for name, cost in costs.items()) <= 3000
    assert len(set(ranks.values())) > 2 and ranks != ranks_of(attrs.evolve(options, rank_gradient=None))
    ends = {
        name: rank for name, rank in silenced.items() if name.startswith("model.layers.1.mlp.") and "down" not in name
    }
    assert set(ends.values()) == {1} and len(ends) == 2 and any(ranks[name] > 1 for name in ends)
    shares = [ranks_of(Lora(r=16, rank_energy=share, rank_gradient=1)) for share in (0.5, 0.9)]
    assert all(shares[0][name] <= shares[1][name] for name in shares[0]) and shares[0] != shares[1]
    error = refused(lambda: Lora(rank_gradient=1))
    assert (error.code, error.where) == ("recipe-missing", "Lora.rank_gradient")


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
