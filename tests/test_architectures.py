"""Every architecture: LoRA on all linear layers trains, saves, reopens and merges."""

import luthier
import pytest
import torch
from luthier.step.opened import open_artifact
from luthier.testing.worlds import ARCHITECTURES, save_tiny_model
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory):
    """The folder of one tiny model."""
    return save_tiny_model(tmp_path_factory.mktemp("worlds") / request.param, request.param)


@pytest.fixture(scope="module")
def run(base, data_file, tmp_path_factory):
    return luthier.train(
        model=str(base),
        data=str(data_file),
        adapter={"name": "lora", "target_modules": "all-linear"},
        output_dir=tmp_path_factory.mktemp("runs") / "run",
        exact_callbacks=["jsonl"],
        max_steps=6,
        global_batch_size=8,
        learning_rate=1e-2,
        merge=True,
    )


def test_lora_lowers_the_loss(run):
    assert run.loss_history[-1] < 0.95 * run.loss_history[0]


def test_the_saved_adapter_gives_the_trained_models_logits(run, logits):
    assert torch.equal(logits(open_artifact(run.artifact).model), logits(run.model))


def test_the_merged_model_is_plain_and_gives_the_trained_models_logits(base, run, logits):
    merged, untrained = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run.merged, base))
    torch.testing.assert_close(logits(merged), logits(run.model), rtol=1e-5, atol=1e-5)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in untrained.named_modules()]
    assert (logits(untrained) - logits(run.model)).abs().max() > 0.05
