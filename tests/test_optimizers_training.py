"""The optimizer of luthier-optimizers in a run: beside AdamW at equal steps, and resumed bit for bit."""

import luthier
import pytest
import torch
from luthier.testing.worlds import save_tiny_model

WIDE = {"name": "lora", "target_modules": "all-linear", "lora_dropout": 0.0, "r": 32}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """With rank 32 its factors have 4,096 elements and more, from which moments are kept in 8 bits."""
    return str(save_tiny_model(tmp_path_factory.mktemp("wide") / "model", hidden_size=128, intermediate_size=128))


def test_it_lowers_the_loss_as_adamw_does_at_equal_steps_and_rate(train, wide_model, tmp_path):
    losses = []
    for name in ("adamw", "adamw_8bit"):
        settings = {"model": wide_model, "optimizer": name, "adapter": WIDE, "learning_rate": 3e-3, "max_steps": 20}
        run = train(**settings, output_dir=tmp_path / name)
        losses.append(run.loss_history)
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert losses[1][-1] < 1.05 * losses[0][-1]


@pytest.mark.parametrize(("adapter", "precision"), [(WIDE, "float32"), ("full", "pure_bf16")], ids=["lora", "full"])
def test_a_run_that_broke_off_resumes_bit_for_bit(train, wide_model, tmp_path, adapter, precision):
    shared = {"model": wide_model, "adapter": adapter, "optimizer": "adamw_8bit", "precision": precision}
    shared |= {"max_steps": 6, "save_steps": 1}

    def break_off(step):
        if step == 4:
            raise RuntimeError("power cut")

    straight = train(**shared, output_dir=tmp_path / "straight")
    with pytest.raises(RuntimeError, match="power cut"):
        train(**shared, callbacks=["jsonl", luthier.on(step_ended=break_off)])
    resumed = train(**shared)
    assert resumed.loss_history == straight.loss_history
    pairs = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
