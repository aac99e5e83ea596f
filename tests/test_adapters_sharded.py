"""Adapters on two ranks, replicated and sharded: the losses of one, and a folder that the whole model opens."""

from pathlib import Path

import luthier
import pytest
from luthier.runs.writing.record import read_record
from luthier.testing.ranks import in_ranks

ADAPTERS = {
    "whole modules and biases": {"name": "lora", "bias": "all", "modules_to_save": ["lm_head"], "lora_dropout": 0.0},
    "pissa": {"name": "lora", "init_lora_weights": "pissa", "r": 4, "rank_energy": 0.5, "lora_dropout": 0.0},
    "learnt scale": {"name": "dora", "learn_scale": True, "loraplus_lr_ratio": 4.0, "lora_dropout": 0.0},
    "adalora": {"name": "adalora", "init_r": 4, "target_r": 2, "lora_dropout": 0.0},
    "prompt": {"name": "prompt_tuning", "num_virtual_tokens": 3},
    "encoded prefix": {"name": "p_tuning_v2", "num_virtual_tokens": 3},
    "bitfit": {"name": "bitfit"},
    "tied lora rows": {"name": "lora", "trainable_token_indices": [9, 40, 41], "lora_dropout": 0.0},
    "tied rows": {"name": "modules", "token_ids": [9, 40, 41]},
    "rows": {"name": "modules", "token_ids": [9, 40, 41], "norms": True},
}
QUICK = ("whole modules and biases",)


def train(settings):
    luthier.train(**settings)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ADAPTERS]
)
def test_two_ranks_give_the_losses_of_one_and_a_folder_that_opens(tmp_path, data_file, biased_folder, name, strategy):
    settings = {
        "model": str(biased_folder["tied" in name]),
        "data": str(data_file),
        "adapter": ADAPTERS[name],
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 4,
        "learning_rate": 0.05,
        "max_steps": 4,
        "max_tokens_per_device": 400,
        "num_threads": 1,
        "precision": "float32",
        "memory_check": False,
    }
    alone = luthier.train(**settings, output_dir=str(tmp_path / "alone"))
    spread = {**settings, "distributed": {"strategy": strategy}, "output_dir": str(tmp_path / strategy)}
    in_ranks(2, train, spread)
    record = read_record(Path(spread["output_dir"]))
    assert record["result"]["loss_history"] == pytest.approx(alone.loss_history, rel=2e-4)
    assert alone.loss_history[-1] != alone.loss_history[0]
    assert record["state"] == "completed"
    answer = luthier.generate(tmp_path / strategy, "What is", max_new_tokens=6)
    assert answer == alone.generate("What is", max_new_tokens=6)


@pytest.fixture(scope="module")
def biased_folder(tmp_path_factory):
    from luthier.testing.worlds import save_tiny_model

    folder = tmp_path_factory.mktemp("biased")
    return [
        save_tiny_model(folder / name, "qwen2", tie_word_embeddings=tied)
        for name, tied in (("apart", False), ("tied", True))
    ]
