"""AdaLoRA: the budget falls as the paper has it, and trajectory, files and merges are PEFT's."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier import Progress
from luthier.testing.worlds import tiny_model
from luthier_lora import AdaLora, options_of
from luthier_lora.adalora import AdaLoraAdapter
from luthier_lora.budget import Budget
from safetensors.torch import load_file

STEPS = 12
OPTIONS = AdaLora(init_r=4, target_r=2, lora_dropout=0.0, tinit=2, tfinal=3, deltaT=2, target_modules="all-linear")


@pytest.fixture
def attach(context):
    """(model, adapter) in a run of so many steps."""

    def build(options=OPTIONS, dtype=torch.float32, steps=STEPS, **changes):
        model = tiny_model().to(dtype)
        adapter = AdaLoraAdapter(options)
        return adapter.attach(model, attrs.evolve(context(), total_steps=steps, **changes)), adapter

    return build


def train(model, adapter, tokens, steps, first=1):
    for step in range(first, first + steps):
        model.zero_grad()
        (model(tokens, labels=tokens).loss + adapter.penalty()).backward()
        adapter.gradients_ready()
        with torch.no_grad():
            for group in adapter.groups():
                for parameter in group.parameters:
                    parameter.sub_(parameter.grad, alpha=0.3)
        adapter.stepped(Progress(step=step, total_steps=STEPS, epoch=0.0))


def ranks(adapter):
    return {name: int((layer.lora_E != 0).sum()) for name, layer in adapter._layers().items()}


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 20))
def test_the_budget_falls_from_the_first_to_the_last_number_by_a_cube(target, more, begin, final, between):
    total = begin + between + final
    budget = Budget(AdaLora(init_r=target + more, target_r=target, tinit=begin, tfinal=final), 3, total)
    every = [budget.ranks_at(step) for step in range(total + 1)]
    assert every == sorted(every, reverse=True)
    assert (every[begin], every[begin + between], every[-1]) == (3 * (target + more), 3 * target, 3 * target)
    for step in range(begin, begin + between):
        share = 1 - (step - begin) / between
        assert abs(every[step] - (3 * target + 3 * more * share**3)) <= 1


def test_the_ranks_of_all_layers_add_up_to_the_budget_at_the_end(attach, tokens):
    model, adapter = attach()
    train(model, adapter, tokens, 2)
    assert set(ranks(adapter).values()) == {4}
    train(model, adapter, tokens, STEPS - 2, first=3)
    assert sum(ranks(adapter).values()) == 2 * len(ranks(adapter))
    assert len(set(ranks(adapter).values())) > 1


def test_the_trajectory_is_pefts(attach, tokens):
    import peft

    model, adapter = attach(dtype=torch.float64)
    given = {name: getattr(OPTIONS, name) for name in ("init_r", "target_r", "lora_alpha", "tinit", "tfinal", "deltaT")}
    targets = sorted({layer.rpartition(".")[2] for layer in adapter.targets.layers})
    config = peft.AdaLoraConfig(**given, total_step=STEPS, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model().double(), config).double().train()
    homes = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    own = adapter.state()["parameters"]
    assert own.keys() == homes.keys()
    for name, parameter in homes.items():
        parameter.data.copy_(own[name])
    for step in range(1, STEPS + 1):
        train(model, adapter, tokens, 1, first=step)
        theirs.zero_grad()
        theirs(input_ids=tokens, labels=tokens).loss.backward()
        with torch.no_grad():
            for parameter in homes.values():
                parameter.sub_(parameter.grad, alpha=0.3)
        theirs.base_model.update_and_allocate(step)
        for name, parameter in homes.items():
            torch.testing.assert_close(own[name], parameter.detach(), rtol=1e-9, atol=1e-11)
    pattern = {n.replace(".lora_E.default", ""): kept for n, kept in theirs.peft_config["default"].rank_pattern.items()}
    assert {n.replace(".lora_E", ""): kept for n, kept in pattern.items()} == adapter.budget.kept


@pytest.mark.parametrize("steps", [1, 7, STEPS])
def test_files_are_pefts_both_ways(attach, context, attached, logits, tokens, tmp_path, steps):
    import peft

    model, adapter = attach()
    train(model, adapter, tokens, steps)
    before = logits(model)
    adapter.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), before, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        options = options_of(tmp_path / folder)
        assert (options.init_r, options.target_r, options.lora_alpha) == (4, 2, 16)
        fresh, other = attach(options, purpose="open", steps=0)
        other.load(tmp_path / folder)
        torch.testing.assert_close(logits(fresh), before, atol=1e-5, rtol=1e-5)
    sizes = {t.shape[0] for n, t in load_file(tmp_path / "ours/adapter_model.safetensors").items() if "lora_E" in n}
    assert sizes == {4} if steps < STEPS else len(sizes) > 1  # in between, ranks that are gone move
    torch.testing.assert_close(logits(adapter.merge(context())), before, atol=1e-4, rtol=1e-4)


def test_a_resumed_run_takes_the_same_ranks_away(attach, logits, tokens):
    model, adapter = attach()
    train(model, adapter, tokens, 5)
    again, other = attach()
    other.load_state(adapter.state())
    for one, part in ((model, adapter), (again, other)):
        train(one, part, tokens, STEPS - 5, first=6)
    assert torch.equal(logits(again), logits(model))
    assert adapter.budget.kept == other.budget.kept


def test_the_penalty_is_nothing_for_orthogonal_factors_and_can_be_left_out(attach):
    _, adapter = attach()
    assert adapter.penalty() > 0.1
    for layer in adapter._layers().values():
        torch.nn.init.orthogonal_(layer.lora_A.weight)
        torch.nn.init.orthogonal_(layer.lora_B.weight)
    assert adapter.penalty() < 1e-5
    assert attach(attrs.evolve(OPTIONS, orth_reg_weight=0.0))[1].penalty() is None


@pytest.mark.parametrize(
    ("steps", "where", "words"), [(5, "tinit", ("tinit", "5", "2", "3")), (None, "adapter", ("adapter",))]
)
def test_a_run_without_time_for_the_ranks_to_fall_is_refused(attach, refused, steps, where, words):
    error = refused(lambda: attach(steps=steps))
    assert (error.code, error.where) == ("recipe-conflict", where)
    assert all(fact in str(error) for fact in words)


def test_ranks_that_would_rise_are_refused(refused):
    assert refused(lambda: AdaLora(init_r=2, target_r=3)).where == "AdaLora.target_r"


def test_a_folder_of_other_options_is_refused_and_nothing_changes(attach, refused, tmp_path):
    attach()[1].save(tmp_path)
    for options in (attrs.evolve(OPTIONS, init_r=5), attrs.evolve(OPTIONS, lora_alpha=3)):
        _, adapter = attach(options)
        before = {name: tensor.clone() for name, tensor in adapter.state()["parameters"].items()}
        assert refused(adapter.load, tmp_path).code == "artifact-mismatch"
        assert all(torch.equal(t, before[n]) for n, t in adapter.state()["parameters"].items())
