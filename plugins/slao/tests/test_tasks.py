"""Tasks one after the other: what is kept, what begins from what, and that an interrupted sequence is the same."""

import json

import luthier
import pytest
import torch
from luthier.testing.worlds import save_tiny_model
from luthier_slao import Slao
from luthier_slao.algebra import orthonormal_rows
from safetensors.torch import load_file

OPTIONS = Slao(r=4, lora_alpha=8)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Two tasks on a tiny model."""
    folder = tmp_path_factory.mktemp("slao")
    model = save_tiny_model(folder / "model")
    for name, answers in (("one", ("1", "2", "3")), ("two", ("no", "yes", "maybe"))):
        rows = [{"prompt": f"{i} and {i % 4}?", "completion": answers[i % 3]} for i in range(16)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(model), "exact_callbacks": [], "global_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
        "memory_check": False, "data": {"validation": 0.25},
        "tasks": [{"name": n, "data": str(folder / f"{n}.jsonl")} for n in ("one", "two")],
    }  # fmt: skip


def pair(run):
    """A and B in use, and the other B, by layer."""
    own = load_file(run / "adapter/adapter_model.safetensors")
    return own, load_file(run / "adapter/slao.safetensors"), json.loads((run / "adapter/slao.json").read_text())


def of_side(tensors, side):
    return {n.removeprefix("base_model.model.").partition(f".{side}")[0]: t for n, t in tensors.items() if side in n}


class Halt:
    def __init__(self, task, step):
        self.task, self.step, self.now = task, step, 0

    @luthier.event
    def task_started(self, task):
        self.now = task

    @luthier.event
    def step_started(self, step):
        if (self.now, step) == (self.task, self.step):
            raise KeyboardInterrupt


def test_the_second_task_is_merged_by_one_over_the_root_of_two(settings, tmp_path):
    report = luthier.continual(settings, adapter=OPTIONS, output_dir=tmp_path)
    (first, first_other, one), (second, trained, two) = (pair(run) for run in report.runs)
    assert (one["num_merged"], two["num_merged"]) == (1, 2)
    merged = of_side(first, "lora_B")
    assert all(torch.equal(first_other[name], tensor) for name, tensor in merged.items())
    for name, now in of_side(second, "lora_B").items():
        expected = merged[name] + 2**-0.5 * (trained[name] - merged[name])
        assert torch.equal(now, expected)


def test_the_second_task_begins_from_orthonormal_rows_and_the_last_trained_b(settings, tmp_path):
    report = luthier.continual({**settings, "learning_rate": 0.0}, adapter=OPTIONS, output_dir=tmp_path)
    (first, _, _), (second, trained, _) = (pair(run) for run in report.runs)
    for name, a in of_side(first, "lora_A").items():
        assert torch.equal(of_side(second, "lora_A")[name], orthonormal_rows(a))
        assert torch.equal(trained[name], of_side(first, "lora_B")[name])


def test_an_interrupted_sequence_equals_an_undisturbed_one(settings, tmp_path):
    settings = {**settings, "save_steps": 2, "async_save": False}
    straight = luthier.continual(settings, adapter=OPTIONS, output_dir=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        luthier.continual(settings, adapter=OPTIONS, output_dir=tmp_path / "cut", exact_callbacks=[Halt(1, 4)])
    resumed = luthier.continual(settings, adapter=OPTIONS, output_dir=tmp_path / "cut")
    for one, other in zip(straight.runs, resumed.runs, strict=True):
        for before, after in zip(pair(one), pair(other), strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(torch.as_tensor(before[n]), torch.as_tensor(after[n])) for n in before)


def test_a_refused_merge_leaves_the_accumulator_as_it_was(settings, tmp_path):
    report = luthier.continual(settings, adapter=Slao(r=4, lora_alpha=8, max_drift=0.0), output_dir=tmp_path)
    (first, _, _), (second, _, numbers) = (pair(run) for run in report.runs)
    assert numbers["num_merged"] == 1
    assert all(torch.equal(of_side(second, "lora_B")[n], t) for n, t in of_side(first, "lora_B").items())


@pytest.mark.parametrize("changed", ["begin_from", "merge_weight"])
def test_the_variants_of_the_paper_give_other_weights(settings, tmp_path, changed):
    value = {"begin_from": "zero", "merge_weight": "inverse"}[changed]
    usual = luthier.continual(settings, adapter=OPTIONS, output_dir=tmp_path / "usual")
    other = luthier.continual(
        settings, adapter=Slao(r=4, lora_alpha=8, **{changed: value}), output_dir=tmp_path / "other"
    )
    one, two = (pair(report.runs[1])[0] for report in (usual, other))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_its_folder_is_read_by_plain_peft(settings, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = luthier.train(
        model=settings["model"], data=settings["tasks"][0]["data"], adapter=OPTIONS, max_steps=3, exact_callbacks=[],
        learning_rate=1e-2, output_dir=tmp_path, memory_check=False,
    )  # fmt: skip
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(settings["model"]), str(run.artifact))
    tokens = torch.arange(3, 11)[None]
    with torch.no_grad():
        ours = run.model.eval()(input_ids=tokens, use_cache=False).logits
        assert torch.allclose(theirs(input_ids=tokens).logits, ours, atol=1e-5)


@pytest.mark.parametrize("gate", [{"max_drift": 0.0}, {"max_loss_rise": 0.0}])
def test_a_refused_task_leaves_no_trace_in_what_answers_and_what_the_next_task_begins_from(settings, tmp_path, gate):
    """The second task has the first one's rows and an absurd rate, at which it unlearns them."""
    rows = {"data": settings["tasks"][0]["data"]}
    tasks = [
        {"name": "one", **rows, "max_steps": 12, "learning_rate": 3e-2},
        {"name": "two", **rows, "learning_rate": 100.0},
    ]
    options = Slao(r=4, lora_alpha=8, merge_weight="replace", **gate)
    report = luthier.continual(settings, tasks=tasks, adapter=options, output_dir=tmp_path)
    (kept, _, one), (refused, other, two) = (pair(run) for run in report.runs)
    assert (one["num_merged"], two["num_merged"]) == (1, 1)
    assert kept.keys() == refused.keys() and all(torch.equal(kept[name], refused[name]) for name in kept)
    assert all(torch.equal(other[name], tensor) for name, tensor in of_side(kept, "lora_B").items())
    losses = report.metrics["eval_loss"]
    assert losses[0] == losses[1]


def test_a_merge_that_lowers_the_held_out_loss_is_kept_as_without_a_gate(settings, tmp_path):
    plain = luthier.continual(settings, adapter=OPTIONS, output_dir=tmp_path / "plain")
    gated = luthier.continual(
        settings, adapter=Slao(r=4, lora_alpha=8, max_loss_rise=0.0), output_dir=tmp_path / "gated"
    )
    for one, other in zip(plain.runs, gated.runs, strict=True):
        for before, after in zip(pair(one), pair(other), strict=True):
            assert all(torch.equal(torch.as_tensor(before[n]), torch.as_tensor(after[n])) for n in before)


def test_a_gate_by_the_held_out_loss_is_refused_where_no_rows_are_held_out(settings, tmp_path):
    recipe = {name: value for name, value in settings.items() if name != "tasks"}
    recipe |= {"data": settings["tasks"][0]["data"], "output_dir": str(tmp_path / "run")}
    with pytest.raises(luthier.LuthierError) as caught:
        luthier.train(recipe, adapter=Slao(r=4, max_loss_rise=0.1))
    assert (caught.value.code, caught.value.where) == ("recipe-conflict", "adapter.max_loss_rise")
