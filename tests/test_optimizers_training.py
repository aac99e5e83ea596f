"""The optimizers of luthier-optimizers in a run: beside AdamW at equal steps, and resumed bit for bit."""

import json
from pathlib import Path

import luthier
import pytest
import torch
from luthier.step.opened import open_artifact
from luthier.testing.worlds import save_tiny_model

TRAINED_ON = Path(luthier.__file__).parent / "demo" / "train.jsonl.gz"
RATES = [
    ("adamw_8bit", 1e-3),
    ("muon", 5e-3),
    ("adafactor", 3e-1),
    ("schedule_free", 3e-3),
    ("ademamix", 1e-3),
    ({"name": "apollo", "rank": 4}, 3e-3),
    ("paged_adamw", 1e-3),
]
WIDE = {"name": "lora", "target_modules": "all-linear", "lora_dropout": 0.0, "r": 32}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """With rank 32 its factors have 4,096 elements and more, from which moments are kept in 8 bits."""
    return str(save_tiny_model(tmp_path_factory.mktemp("wide") / "model", hidden_size=128, intermediate_size=128))


def test_it_lowers_the_loss_as_adamw_does_at_equal_steps_and_rate_and_the_log_has_its_bytes(
    train, wide_model, tmp_path
):
    losses, state_bytes = [], []
    for name in ("adamw", "adamw_8bit"):
        settings = {"model": wide_model, "optimizer": name, "adapter": WIDE, "learning_rate": 3e-3, "max_steps": 20}
        run = train(**settings, output_dir=tmp_path / name)
        losses.append(run.loss_history)
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        state_bytes += [line["bytes_per_weight"] for line in lines if line["event"] == "optimizer_state"]
    assert state_bytes[0] == pytest.approx(8, rel=0.01) and 2.03 <= state_bytes[1] < 3  # small factors keep float32
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert losses[1][-1] < 1.05 * losses[0][-1]


RESUMED = [
    ("adamw_8bit", WIDE, "float32"),
    ("adamw_8bit", "full", "pure_bf16"),
    ("schedule_free", "full", "float32"),
    ({"name": "evolution", "pairs": 1}, "full", "pure_bf16"),
    *(
        pytest.param(name, adapter, precision, marks=pytest.mark.slow)
        for name in (
            "muon",
            "adafactor",
            "schedule_free",
            "ademamix",
            {"name": "apollo", "rank": 4},
            "paged_adamw",
            "auto",
            {"name": "evolution", "pairs": 2, "rank": 2},
        )
        for adapter, precision in ((WIDE, "float32"), ("full", "pure_bf16"))
    ),
]


@pytest.mark.parametrize(("optimizer", "adapter", "precision"), RESUMED)
def test_a_run_that_broke_off_resumes_bit_for_bit(train, wide_model, tmp_path, optimizer, adapter, precision):
    shared = {"model": wide_model, "adapter": adapter, "optimizer": optimizer, "precision": precision}
    shared |= {"max_steps": 6, "save_steps": 1}

    def break_off(step):
        if step == 4:
            raise RuntimeError("power cut")

    straight = train(**shared, output_dir=tmp_path / "straight")
    with pytest.raises(RuntimeError, match="power cut"):
        train(**shared, exact_callbacks=["jsonl", luthier.on(step_ended=break_off)])
    resumed = train(**shared)
    assert resumed.loss_history == straight.loss_history
    pairs = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "rate"), RATES)
def test_with_its_documented_rate_each_comes_within_five_percent_of_adamw(train, tmp_path, optimizer, rate):
    shared = {
        "model": "demo",
        "data": str(TRAINED_ON),
        "adapter": {**WIDE, "r": 16},
        "max_steps": 30,
        "warmup_steps": 4,
    }

    def last_losses(optimizer, rate, kind, output):
        run = train(**shared, optimizer=optimizer, learning_rate=rate, lr_scheduler_type=kind, output_dir=output)
        return sum(run.loss_history[-5:])

    kind = "constant_with_warmup" if optimizer == "schedule_free" else "cosine"
    found = last_losses(optimizer, rate, kind, tmp_path / "other")
    assert found < 1.05 * last_losses("adamw", 1e-3, "cosine", tmp_path / "adamw")


@pytest.mark.slow
def test_evolution_lowers_the_loss_at_its_documented_rate(train, tmp_path):
    """Far less than AdamW does in as many steps, as its README says."""
    run = train(model="demo", data=str(TRAINED_ON), adapter={**WIDE, "r": 16}, max_steps=30, warmup_steps=4,
                optimizer={"name": "evolution", "pairs": 8}, learning_rate=1e-2)  # fmt: skip
    assert sum(run.loss_history[-5:]) / 5 < 0.93 * run.loss_history[0]


def test_a_schedule_free_run_evaluates_saves_and_leaves_the_average(train, data_file, logits, tmp_path):
    shared = {"optimizer": "schedule_free", "adapter": "full", "max_steps": 4, "eval_steps": 2, "save_steps": 2}
    run = train(**shared, data={"train": [str(data_file)], "validation": [str(data_file)]}, learning_rate=3e-2)
    opened = open_artifact(tmp_path / "run")
    assert torch.equal(logits(opened.model), logits(run.model))
    stepper = run._setup.optimizer
    assert stepper.averaged  # and these are not the weights that it steps
    assert run.evaluate()["eval_loss"] == pytest.approx(run.eval_loss, rel=1e-6)
    assert torch.equal(logits(opened.model), logits(run.model))
    assert not torch.equal(next(iter(stepper.state.values()))["z"], next(iter(stepper.state)).detach())
