"""AdaLoRA against PEFT's own loop, and what a schedule adds to checkpoints and files."""

import copy
import warnings

import pytest
import torch
from luthier import LuthierError, Progress
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model
from luthier_peft import AdaLoraConfig
from peft import AdaLoraConfig as Theirs
from peft import PeftModel, get_peft_model

from .conftest import IDS, QV, World, distance, outputs

SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2}


def options(**changes):
    return AdaLoraConfig(**{"target_modules": QV, **SCHEDULE, **changes})


def theirs(steps):
    """PEFT's documented loop: its forward adds the penalty, and the ranks are allocated after each step."""
    model = tiny_model()
    torch.manual_seed(0)
    handle = get_peft_model(model, Theirs(target_modules=QV, task_type="CAUSAL_LM", total_step=steps, **SCHEDULE))
    optimizer = torch.optim.AdamW([p for p in handle.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    handle.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        handle(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        handle.base_model.update_and_allocate(step)
    return model


def ranks(world):
    """How many singular values of each layer are not zero."""
    return [int((p != 0).sum()) for n, p in world.model.named_parameters() if "lora_E" in n]


def plain(world, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outputs(PeftModel.from_pretrained(copy.deepcopy(world.base), folder))


def test_it_trains_as_pefts_own_loop_does():
    world = World(options(), steps=10)
    world.train(10)
    expected = dict(theirs(10).named_parameters())
    own = {n: p for n, p in world.model.named_parameters() if "lora_" in n}
    assert len(own) == 12
    for name, parameter in own.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-7)


def test_the_budget_falls_to_target_r_at_total_step_minus_tfinal():
    world = World(options(), steps=10)
    world.train(1)
    assert sum(ranks(world)) == 4 * 6
    world.train(7)
    assert sum(ranks(world)) == 4 * 2
    world.train(2)
    assert sum(ranks(world)) == 4 * 2


def test_total_step_is_the_runs_where_it_is_left_out():
    assert World(options(), steps=7).part._handle.peft_config["default"].total_step == 7
    assert World(options(total_step=9), steps=10).part._handle.peft_config["default"].total_step == 9


def test_a_run_without_a_known_number_of_steps_needs_total_step():
    assert World(options(total_step=9), steps=None).part._handle.peft_config["default"].total_step == 9
    with pytest.raises(LuthierError) as caught:
        World(options(), steps=None)
    assert (caught.value.code, caught.value.where.endswith("total_step")) == ("recipe-missing", True)


def test_a_schedule_that_the_run_would_not_finish_is_refused():
    with expect_error("recipe-conflict", "adapter peft.adalora", "target_r", "18", "10") as caught:
        World(options(total_step=20), steps=10)
    assert caught.value.code == "recipe-conflict"


def test_a_schedule_without_room_for_its_phases_is_refused_in_pefts_words():
    with expect_error("recipe-out-of-range", "adapter peft.adalora"):
        World(options(tinit=8), steps=10)


def test_outside_of_a_run_it_attaches_for_loading():
    world = World(options(), steps=0)
    assert world.outputs().equal(outputs(world.base))


def test_importance_is_right_where_the_loop_drops_gradients_before_it_tells_of_the_step():
    kept, dropped = World(options(), steps=10), World(options(), steps=10)
    for world in (kept, dropped):
        optimizer = torch.optim.SGD(world.parameters, lr=0.1)
        for step in range(1, 4):
            optimizer.zero_grad()
            world.model(input_ids=IDS, labels=IDS).loss.backward()
            world.part.gradients_ready()
            optimizer.step()
            if world is dropped:
                optimizer.zero_grad(set_to_none=True)
            world.part.stepped(Progress(step=step, total_steps=10, epoch=0.0))
    importance = [w.part._handle.base_model.rankallocator.exp_avg_ipt for w in (kept, dropped)]
    assert all(importance[0][n].equal(importance[1][n]) and importance[0][n].any() for n in importance[0])


def test_the_penalty_is_pefts_orthogonality_once_a_step():
    world = World(options(orth_reg_weight=0.3), steps=10)
    grams = []
    for name, matrix in world.model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            product = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
            grams.append((product - torch.eye(6)).pow(2).sum().sqrt())
    assert world.part.penalty().item() == pytest.approx(0.3 * float(sum(grams)) / len(grams), rel=1e-6)
    assert World(options(orth_reg_weight=0.0), steps=10).part.penalty() is None


@pytest.mark.parametrize("done", [3, 5, 8, 10])
def test_the_file_gives_the_models_outputs_at_every_point_of_the_schedule(tmp_path, done):
    world = World(options(deltaT=3), steps=10)
    world.train(done)
    world.part.save(tmp_path)
    assert distance(plain(world, tmp_path), world.outputs()) < 1e-6
    fresh = World(options(deltaT=3), seed=1)
    fresh.part.load(tmp_path)
    assert distance(fresh.outputs(), world.outputs()) < 1e-6


def test_the_finished_file_holds_the_ranks_kept_and_no_others(tmp_path):
    from safetensors.torch import load_file

    world = World(options(), steps=10)
    world.train(10)
    world.part.save(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.shape[0] for n, t in held.items() if n.endswith("lora_E")) == 4 * 2


def test_saving_in_between_changes_nothing_of_the_training(tmp_path):
    straight, saving = World(options(), steps=10), World(options(), steps=10)
    straight.train(10)
    optimizer = torch.optim.AdamW([g.settings(0.0) for g in saving.part.groups()], lr=5e-3)
    for _ in range(10):
        saving.train(1, optimizer=optimizer)
        saving.part.save(tmp_path)
    assert saving.outputs().equal(straight.outputs())


def test_loading_leaves_the_parameters_that_the_optimizer_knows(tmp_path):
    world, fresh = World(options(), steps=10), World(options(), seed=1)
    world.train(10)
    world.part.save(tmp_path)
    before = [id(p) for p in fresh.parameters]
    fresh.part.load(tmp_path)
    assert [id(p) for p in fresh.parameters] == before
    fresh.part.save(tmp_path / "again")
    assert distance(plain(world, tmp_path / "again"), world.outputs()) < 1e-6


def test_a_file_of_another_initial_rank_is_refused(tmp_path):
    world = World(options(), steps=10)
    world.train(10)
    world.part.save(tmp_path)
    with pytest.raises(LuthierError, match="init_r 4") as caught:
        World(options(init_r=4)).part.load(tmp_path)
    assert caught.value.code == "artifact-mismatch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_rank_count_stays_frozen_where_peft_casts_it(dtype):
    world = World(options(), steps=10)
    part = world.part.__class__(options())
    model = world.base.to(dtype)
    part.attach(model, world.context)
    names = [n for g in part.groups() for n in g.names]
    assert len(names) == 12 and not any("ranknum" in n for n in names)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "ranknum" in n)
