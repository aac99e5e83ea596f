"""The acceptance list of SLAO, points 13 to 18: here, or in the file that the table names.

| point | test |
|---|---|
| 13 rows | plugins/slao/tests/test_algebra.py::test_rows_become_orthonormal_and_span_what_they_spanned |
| 13 signs | plugins/slao/tests/test_algebra.py::test_the_sign_is_that_of_the_diagonal_so_that_orthonormal_rows_stay_as_they_are |
| 13 zero | plugins/slao/tests/test_algebra.py::test_a_row_of_zeros_does_not_vanish |
| 14 beginning | plugins/slao/tests/test_tasks.py::test_the_second_task_begins_from_orthonormal_rows_and_the_last_trained_b |
| 14 merge | plugins/slao/tests/test_tasks.py::test_the_second_task_is_merged_by_one_over_the_root_of_two |
| 14 share | plugins/slao/tests/test_algebra.py::test_b_moves_by_exactly_its_share_of_the_difference |
| 15 two adapters, one scale | test_two_adapters_are_all_that_is_kept_and_the_scale_stays_whatever_the_number_of_tasks |
| 15 plain LoRA | test_the_first_task_is_plain_lora |
| 15 optimizer | test_each_task_begins_with_a_fresh_optimizer |
| 16 between steps | plugins/slao/tests/test_tasks.py::test_an_interrupted_sequence_equals_an_undisturbed_one |
| 16 in a merge | test_a_sequence_cut_off_in_the_middle_of_a_merge_ends_as_the_undisturbed_one |
| 17 refused merge | plugins/slao/tests/test_tasks.py::test_a_refused_merge_leaves_the_accumulator_as_it_was |
| 18 toy | test_slao_ends_below_sequential_lora_on_every_one_of_eight_seeds |
"""

import json

import luthier
import pytest
import torch
from luthier.state_tree import load_state
from luthier.testing import raise_inside
from luthier_slao.algebra import merge_factor, merge_share, orthonormal_rows
from luthier_slao.layers import write_whole
from safetensors.torch import load_file

PAIR = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
SEEDS, TASKS, SIZE, RANK, STEPS = 8, 6, 16, 4, 150


def tensors_of(folder, name="adapter_model.safetensors"):
    return load_file(folder / "adapter" / name)


@pytest.mark.parametrize(
    ("targets", "bound"),
    [(["o_proj", "down_proj"], 0.0), pytest.param(["q_proj", "v_proj"], 1e-7, marks=pytest.mark.slow)],
)
def test_the_first_task_is_plain_lora(train, tmp_path, targets, bound):
    """It is so to the bit if no two layers share their input. LoRA computes the products of those that do as one."""
    settings = {"max_steps": 3, "precision": "float32"}
    runs = [
        train(adapter={"name": name, **PAIR, "target_modules": targets}, output_dir=tmp_path / name, **settings)
        for name in ("lora", "slao")
    ]
    assert runs[0].loss_history == runs[1].loss_history
    lora, slao = (tensors_of(run.output_path) for run in runs)
    assert lora.keys() == slao.keys()
    for name in lora:
        assert torch.allclose(lora[name], slao[name], atol=bound, rtol=0), name
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


def test_each_task_begins_with_a_fresh_optimizer(sequence, tmp_path):
    """After the first step of AdamW both moments come from one gradient, in the second task as in the first."""
    two = {**sequence, "tasks": sequence["tasks"][:2], "max_steps": 1}
    for run in luthier.continual(two, output_dir=tmp_path / "runs").runs:
        moments = load_state(run / "checkpoints/step-00000001")["optimizer"]["state"].values()
        assert len(moments) == 8
        for moment in moments:
            assert int(moment["step"]) == 1
            mean, square = moment["exp_avg"] / (1 - 0.9), moment["exp_avg_sq"] / (1 - 0.999)
            assert torch.allclose(mean.square(), square, rtol=1e-4, atol=1e-12)


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


def drawn(*shape, seed):
    return torch.randn(SEEDS, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made_tasks():
    """Maps [seeds, out, in], each a common one of rank 2 and one of rank 2 of its own, of equal size."""
    maps = [drawn(SIZE, 2, seed=2 * i) @ drawn(2, SIZE, seed=2 * i + 1) / SIZE**0.5 for i in range(TASKS + 1)]
    return [maps[0] + own for own in maps[1:]]


def fitted(a, b, target):
    """Train both factors on a task by Adam, over inputs of unit covariance."""
    a, b = (factor.clone().requires_grad_() for factor in (a, b))
    optimizer = torch.optim.Adam([a, b], lr=3e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (b @ a - target).square().sum().backward()
        optimizer.step()
    return a.detach(), b.detach()


def mean_loss(a, b, tasks):
    """[seeds]: the loss over all tasks at the end."""
    return torch.stack([(b @ a - target).square().sum((1, 2)) for target in tasks]).mean(0) / SIZE


def begun():
    return drawn(RANK, SIZE, seed=99) / SIZE**0.5, torch.zeros(SEEDS, SIZE, RANK, dtype=torch.float64)


def in_sequence(tasks):
    a, b = begun()
    for target in tasks:
        a, b = fitted(a, b, target)
    return mean_loss(a, b, tasks)


def by_slao(tasks):
    a, b = begun()
    merged = b
    for number, target in enumerate(tasks, 1):
        if number > 1:
            a = torch.stack([orthonormal_rows(one) for one in a])
        a, b = fitted(a, b, target)
        merged = merge_factor(merged, b, merge_share("inverse_sqrt", number))
    return mean_loss(a, merged, tasks)


def test_slao_ends_below_sequential_lora_on_every_one_of_eight_seeds():
    tasks = made_tasks()
    sequential, slao = in_sequence(tasks), by_slao(tasks)
    assert sequential.shape == (SEEDS,) and bool((slao < sequential).all())
    assert float(slao.mean()) < 0.9 * float(sequential.mean())
