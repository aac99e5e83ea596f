"""PEFT's methods end to end: each trains, resumes bit for bit, reopens, and merges into a plain model."""

import os
import signal

import luthier
import pytest
import torch
from luthier.runs.writing.active_run import Interrupted
from luthier.step.opened import open_artifact
from transformers import AutoModelForCausalLM

METHODS = {
    "loha": {"name": "peft.loha", "r": 4, "module_dropout": 0.2},
    "oft": {"name": "peft.oft", "oft_block_size": 8},
    "vera": {"name": "peft.vera", "r": 8, "vera_dropout": 0.1},
    "adalora": {"name": "peft.adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "lora_dropout": 0.1},
}


def cut_after(step):
    last = step

    def end(step):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    return luthier.on(step_ended=end)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_trains_resumes_reopens_and_merges(train, tmp_path, method, logits, model_folder):
    shared = {"adapter": method, "num_train_epochs": 2, "learning_rate": 3e-2, "merge": True}
    straight = train(**shared, output_dir=tmp_path / "straight")
    live, base = logits(straight.model), logits(AutoModelForCausalLM.from_pretrained(model_folder))
    assert straight.loss_history[-1] < straight.loss_history[0]
    assert (live - base).abs().max() > 1e-3

    with pytest.raises(Interrupted):
        train(**shared, exact_callbacks=["jsonl", cut_after(3)])
    resumed = train(**shared)
    assert resumed.loss_history == straight.loss_history
    assert torch.equal(logits(resumed.model), live)

    torch.testing.assert_close(logits(open_artifact(straight.artifact).model), live, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(straight.merged)), live, rtol=1e-4, atol=1e-5
    )


def test_a_method_that_mixes_documents_trains_one_document_at_a_time(train):
    run = train(adapter="peft.lily", packing=False, num_train_epochs=2)
    assert run.loss_history[-1] < run.loss_history[0]


def test_an_options_object_of_pefts_own_name_is_the_part(train, tmp_path):
    from luthier_peft import LoHaConfig

    by_object = train(adapter=LoHaConfig(r=4), output_dir=tmp_path / "object")
    by_name = train(adapter={"name": "peft.loha", "r": 4}, output_dir=tmp_path / "name")
    assert by_object.loss_history == by_name.loss_history


def test_pefts_lora_and_ours_train_alike_without_dropout(train, tmp_path):
    shared = {"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    ours = train(adapter={"name": "lora", "lora_alpha": 8, **shared}, output_dir=tmp_path / "ours")
    theirs = train(adapter={"name": "peft.lora", "lora_alpha": 8, **shared}, output_dir=tmp_path / "theirs")
    assert theirs.loss_history[0] == pytest.approx(ours.loss_history[0], rel=1e-6)
    assert theirs.loss_history[-1] == pytest.approx(ours.loss_history[-1], rel=0.02)
