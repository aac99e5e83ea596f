"""Tasks one after the other: each decomposes what the one before has left."""

import json
import shutil
from pathlib import Path

import luthier
import pytest
import torch
import torch.distributed as dist
from luthier import LuthierError
from luthier.runs.writing.record import read_record
from luthier.testing import contexts
from luthier.testing.ranks import in_ranks
from luthier_osft import Osft, adapter
from luthier_osft.audit import audit_model
from luthier_osft.decompose import decompose, decomposed_shapes
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from transformers import AutoModelForCausalLM

FORMS = ("core", pytest.param("factored", marks=pytest.mark.slow))
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def sequence(train, rows_of):
    """Two tasks on the tiny model, merged after each."""
    settings = {name: value for name, value in train.settings.items() if name not in ("data", "output_dir")}
    tasks = [{"name": name, "data": rows_of(name)} for name in ("one", "two")]
    return {**settings, "data": {"validation": 0.25}, "tasks": tasks, "merge": True}


def merged(run):
    return load_file(run / "merged/model.safetensors")


def trained(run):
    return load_file(run / "adapter/osft.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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


@pytest.mark.parametrize("form", FORMS)
def test_the_second_task_keeps_the_main_directions_of_what_the_first_has_left(sequence, tmp_path, form):
    report = luthier.continual(sequence, adapter=Osft(form=form), output_dir=tmp_path, eval_base=False)
    first, second = (merged(run) for run in report.runs)
    for name in (f"{LAYER}.weight", "model.layers.1.mlp.down_proj.weight"):
        one, change = first[name].double(), (second[name] - first[name]).double()
        u, _, v = torch.linalg.svd(one)
        rank = min(one.shape) * 3 // 4
        floor = 4e-7 * one.norm() / change.norm()  # the merged weights are rounded to float32
        assert change.norm() > 1e-3
        assert (u[:, :rank].T @ change).norm() / change.norm() < max(1e-6, floor)
        assert (change @ v[:rank].T).norm() / change.norm() < max(1e-6, floor)


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_sequence_equals_an_undisturbed_one(sequence, tmp_path, form):
    settings = {**sequence, "save_steps": 2, "async_save": False, "eval_base": False}
    straight = luthier.continual(settings, adapter=Osft(form=form), output_dir=tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        halt = [Halt(1, 4)]
        luthier.continual(settings, adapter=Osft(form=form), output_dir=tmp_path / "cut", exact_callbacks=halt)
    resumed = luthier.continual(settings, adapter=Osft(form=form), output_dir=tmp_path / "cut")
    for one, other in zip(straight.runs, resumed.runs, strict=True):
        assert equal(trained(one), trained(other)) and equal(merged(one), merged(other))


@pytest.mark.slow
def test_the_artifact_of_a_later_task_opens_on_the_original_base(sequence, tmp_path):
    report = luthier.continual(sequence, adapter=Osft(), output_dir=tmp_path, eval_base=False)
    luthier.merge(report.runs[1], tmp_path / "again")
    one, other = (load_file(p / "model.safetensors") for p in (tmp_path / "again", report.runs[1] / "merged"))
    assert equal(one, other)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").num_parameters() > 0


@pytest.mark.slow
def test_a_schedule_preserves_nothing_in_the_first_task_and_half_in_the_second(sequence, tmp_path):
    report = luthier.continual(sequence, adapter=Osft(rank_rule="schedule"), output_dir=tmp_path, eval_base=False)
    first, second = (trained(run) for run in report.runs)
    assert not any(name.startswith(f"frozen.{LAYER}.out") for name in first)
    assert second[f"frozen.{LAYER}.out.basis"].shape == (32, 16)
    one, two = (merged(run)[f"{LAYER}.weight"].double() for run in report.runs)
    u = torch.linalg.svd(one).U[:, :16]
    floor = 4e-7 * one.norm() / (two - one).norm()
    assert (u.T @ (two - one)).norm() / (two - one).norm() < max(1e-6, floor)
    assert second[f"{LAYER}.core"].shape == (32, 32)
    assert not second[f"{LAYER}.core"][16:].any() and not second[f"{LAYER}.core"][:, 16:].any()


def in_turn(settings):
    return [str(run) for run in luthier.continual(settings).runs]


SPREAD = {
    "core-fsdp": (Osft(), "fsdp"),
    "factored-fsdp": (Osft(form="factored"), "fsdp"),
    "schedule-fsdp": (Osft(rank_rule="schedule"), "fsdp"),
    "importance-fsdp": (Osft(rank_rule="importance", unfreeze_rank_ratio=0.5), "fsdp"),
    "non-targets-fsdp": (Osft(train_non_targets=True), "fsdp"),
    "core-ddp": (Osft(), "ddp"),
    "factored-ddp": (Osft(form="factored"), "ddp"),
}


@pytest.fixture
def exact_sequence(sequence, model_folder):
    """The same sequence in float64."""
    return {**sequence, "model": {"name_or_path": str(model_folder), "dtype": "float64"}, "eval_base": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPREAD)
def test_two_ranks_train_the_sequence_that_one_does(exact_sequence, tmp_path, name):
    options, strategy = SPREAD[name]
    settings = {**exact_sequence, "adapter": options}
    alone = luthier.continual({**settings, "output_dir": str(tmp_path / "alone")}).runs
    spread = {**settings, "output_dir": str(tmp_path / "ranks"), "distributed": strategy}
    ranks, other_ranks = in_ranks(2, in_turn, spread)
    assert ranks == other_ranks
    for one, other in zip(alone, map(Path, ranks), strict=True):
        losses = [read_record(run)["result"]["loss_history"] for run in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        own, others = merged(one), merged(other)
        assert own.keys() == others.keys()
        assert all(torch.allclose(own[n], others[n], atol=1e-9) for n in own)
    shares = [audit_model(runs[0] / "merged", runs[1]) for runs in (alone, [Path(run) for run in ranks])]
    for one, other in zip(*(audit.layers for audit in shares), strict=True):
        assert one.holds and other.holds and one.preserved == other.preserved
        assert (one.left, one.right) == pytest.approx((other.left, other.right), rel=1e-3)
        assert one.change == pytest.approx(other.change, rel=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (12, 8), (5, 20)])
@pytest.mark.parametrize("tails", [False, True])
def test_ranks_that_wait_for_a_decomposition_know_its_shapes(shape, tails):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for rank in range(min(shape)):
        made = {name: tuple(tensor.shape) for name, tensor in decompose(weight, rank, tails=tails).items()}
        assert made == decomposed_shapes(weight, rank, tails=tails)


def cut_back(run, step):
    """Make a finished run one that was stopped after a step."""
    record = json.loads((run / "run.json").read_text())
    unfinished = {name: value for name, value in record.items() if name != "result"}
    (run / "run.json").write_text(json.dumps({**unfinished, "state": "stopped"}))
    for name in ("adapter", "merged", "task-state"):
        shutil.rmtree(run / name)
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["core", "factored"])
def test_sharded_ranks_resume_within_the_second_task(exact_sequence, tmp_path, form):
    settings = {
        **exact_sequence,
        "adapter": Osft(form=form),
        "distributed": "fsdp",
        "output_dir": str(tmp_path / "out"),
    }
    settings |= {"save_steps": 2, "async_save": False}
    runs = [Path(run) for run in in_ranks(2, in_turn, settings)[0]]
    before = trained(runs[1]), merged(runs[1]), read_record(runs[1])["result"]["loss_history"]
    cut_back(runs[1], 2)
    in_ranks(2, in_turn, settings)
    after = trained(runs[1]), merged(runs[1]), read_record(runs[1])["result"]["loss_history"]
    assert equal(before[0], after[0]) and equal(before[1], after[1]) and before[2] == after[2]
    log = (runs[1] / "log.jsonl").read_text()
    assert "resumed" in log


@pytest.fixture
def mesh():
    """One process that shards with itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_later_task_on_shards_that_were_attached_for_the_first_is_refused(mesh):
    part = adapter.OsftAdapter(Osft())
    model = contexts.base_model()
    part.attach(model, contexts.context(model))
    for layer in part.layers.values():
        distribute_module(layer, mesh)
    part.begin_task(0, 2)
    with pytest.raises(LuthierError, match="sharded"):
        part.begin_task(1, 2)
