"""SLAO beside LoRA: its first task is plain LoRA, and no task makes it larger."""

import json

import luthier
import pytest
import torch
from luthier.testing import raise_inside
from luthier_slao.layers import write_whole
from safetensors.torch import load_file

PAIR = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def tensors_of(folder, name="adapter_model.safetensors"):
    return load_file(folder / "adapter" / name)


def test_the_first_task_is_plain_lora_in_its_losses_to_the_bit_and_in_its_factors_to_rounding(train, tmp_path):
    settings = {"max_steps": 3, "precision": "float32"}
    runs = [train(adapter={"name": name, **PAIR}, output_dir=tmp_path / name, **settings) for name in ("lora", "slao")]
    assert runs[0].loss_history == runs[1].loss_history
    lora, slao = (tensors_of(run.output_path) for run in runs)
    assert lora.keys() == slao.keys()
    for name in lora:
        assert torch.allclose(lora[name], slao[name], atol=1e-7), name  # LoRA's products are one operation
    assert any(tensor.abs().max() > 0 for name, tensor in slao.items() if "lora_B" in name)


@pytest.fixture
def sequence(model_folder, rows, tmp_path):
    """Three tasks of SLAO, checkpoints kept."""
    for number in range(3):
        lines = [json.dumps(row) + "\n" for row in rows[number::3]]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    return {
        "model": str(model_folder), "exact_callbacks": [], "global_batch_size": 4, "max_steps": 2, "memory_check": False,
        "learning_rate": 1e-2, "adapter": {"name": "slao", **PAIR}, "data": {"validation": 0.25}, "eval_base": False,
        "tasks": [{"name": str(n), "data": str(tmp_path / f"{n}.jsonl")} for n in range(3)], "async_save": False,
    }  # fmt: skip


@pytest.mark.slow
def test_two_adapters_are_all_that_is_kept_and_the_scale_stays_whatever_the_number_of_tasks(sequence, tmp_path):
    report = luthier.continual(sequence, output_dir=tmp_path / "runs")
    kept = []
    for run in report.runs:
        sizes = {name: t.shape for file in ("adapter_model", "slao") for name, t in
                 tensors_of(run, f"{file}.safetensors").items()}  # fmt: skip
        config = json.loads((run / "adapter/adapter_config.json").read_text())
        kept.append((sizes, config["lora_alpha"], config["r"], sorted(p.name for p in (run / "adapter").iterdir())))
    assert len(kept) == 3 and kept[0] == kept[1] == kept[2]


def is_second_merge_begun(frame):
    """The second task's merge has written one layer, and not the next."""
    caller = frame.f_back
    if caller.f_code.co_name != "end_task" or caller.f_locals["index"] != 1:
        return False
    return caller.f_locals["name"] != next(iter(caller.f_locals["self"].layers))


def test_a_sequence_cut_off_in_the_middle_of_a_merge_ends_as_the_undisturbed_one(sequence, tmp_path):
    straight = luthier.continual(sequence, output_dir=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt), raise_inside(write_whole, KeyboardInterrupt(), is_second_merge_begun):
        luthier.continual(sequence, output_dir=tmp_path / "cut")
    resumed = luthier.continual(sequence, output_dir=tmp_path / "cut")
    for one, other in zip(straight.runs, resumed.runs, strict=True):
        for file in ("adapter_model.safetensors", "slao.safetensors"):
            before, after = tensors_of(one, file), tensors_of(other, file)
            assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
