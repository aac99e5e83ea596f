"""What fits: the limit that `auto` finds, the refusal of what cannot fit, and what a device has."""

import luthier
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.data.batches.packing import Packing
from luthier.errors import LuthierError
from luthier.hardware import free_memory as available
from luthier.hardware.free_memory import measure_capacity
from luthier.memory.bound import bound
from luthier.memory.fit import GRAIN, filled, largest
from luthier.testing.worlds import ARCHITECTURES, tiny_model

CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None)
@given(
    per_token=st.integers(1, 10_000),
    base=st.integers(0, 10**9),
    curve=st.integers(0, 20),
    low=st.integers(1, 2_000),
    span=st.integers(0, 40_000),
    budget=st.integers(1, 10**9),
)
def test_the_largest_that_fits_is_found_within_a_grain_and_a_fiftieth(per_token, base, curve, low, span, budget):
    def peak(tokens):
        return base + per_token * tokens + curve * tokens**2 // 100

    asked = []
    found = largest(lambda tokens: asked.append(tokens) or peak(tokens), low, low + span, budget)
    best = max((t for t in range(low, low + span + 1) if peak(t) <= budget), default=None)
    assert (found is None) == (best is None)
    if found is not None:
        assert peak(found) <= budget
        assert found >= best - max(GRAIN, found // 32) or peak(found) >= budget - budget // 50
    assert len(asked) <= 25


def test_rows_fill_a_micro_batch_from_the_longest_on_and_never_beyond_its_limit():
    from luthier.data.examples import TokenExample

    rows = [TokenExample(input_ids=torch.zeros(n, dtype=torch.int32).numpy(), labels=None) for n in (5, 9, 3)]
    assert [len(row.input_ids) for row in filled(rows, 30, Packing(max_tokens=30))] == [9, 5, 9, 3]
    assert [len(row.input_ids) for row in filled(rows, 9, Packing(max_tokens=9))] == [9]
    prompted = Packing(max_tokens=30, virtual_tokens=4)
    assert [len(row.input_ids) for row in filled(rows, 30, prompted)] == [9, 5]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(available)` makes this machine one with so many bytes to spare; further files by their path."""
    proc, groups = tmp_path / "machine/proc", tmp_path / "machine/cgroup"
    monkeypatch.setattr(available, "PROC", proc)
    monkeypatch.setattr(available, "GROUPS", groups)

    def make(free, **files):
        given = {proc / "meminfo": f"MemTotal: 99 kB\nMemAvailable: {free // 1024} kB\n"}
        given |= {(proc if name.startswith("self") else groups) / name: text for name, text in files.items()}
        for path, text in given.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text))

    return make


def test_a_cpu_has_what_the_kernel_says_is_available(machine):
    machine(1 << 30)
    found = measure_capacity(CPU)
    assert found.free == 1 << 30
    assert found.total > found.free
    assert found.bound == "this machine"


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("0::/job", ("job/memory.max", "job/memory.current", "job/memory.stat")),
        (
            "4:memory:/job",
            ("memory/job/memory.limit_in_bytes", "memory/job/memory.usage_in_bytes", "memory/job/memory.stat"),
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_a_control_group_bounds_it_and_its_file_pages_count_as_free(machine, line, names):
    limit, used, stat = names
    machine(1 << 30, **{"self/cgroup": line, limit: 500_000_000, used: 300_000_000, stat: "inactive_file 100000000\n"})
    found = measure_capacity(CPU)
    assert found.free == 300_000_000
    assert found.total == 500_000_000
    assert "control group" in found.bound


def test_the_limit_of_a_group_above_counts_and_none_is_no_limit(machine):
    files = {"self/cgroup": "0::/a/b", "a/b/memory.max": "max", "a/b/memory.current": 7}
    machine(1 << 30, **files)
    assert measure_capacity(CPU).free == 1 << 30
    machine(1 << 30, **files, **{"a/memory.max": 1000, "a/memory.current": 400})
    assert measure_capacity(CPU).free == 600


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bound_is_above_what_a_model_needs(architecture):
    model = tiny_model(architecture)
    weights = sum(p.numel() for p in model.parameters())
    assert bound(model.config, 64, 64) > 16 * weights
    assert bound(model.config, 128, 64) > bound(model.config, 64, 64)


@pytest.fixture
def shapes_only(model_folder, tmp_path):
    """The model's folder without its weights."""
    import shutil

    folder = tmp_path / "shapes"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    return folder


def test_a_run_that_cannot_fit_is_refused_before_its_weights_are_read(train, shapes_only, machine, tmp_path):
    machine(1 << 18)
    with pytest.raises(LuthierError) as caught:
        train(model=str(shapes_only))
    text = str(caught.value)
    assert caught.value.code == "memory-too-small"
    assert "256.0 KiB are free on cpu" in text
    assert "a micro-batch of " in text
    for cause in ("weights", "activations", "optimizer"):
        assert cause in text
    assert "memory_check: false starts it all the same" in text
    assert not (tmp_path / "run").exists()


def test_the_refusal_names_what_would_help(train, machine):
    machine(1 << 18)
    with pytest.raises(LuthierError) as caught:
        train(adapter="full")
    remedy = caught.value.remedy
    assert "gradient_checkpointing: true" in remedy
    assert "max_tokens_per_device: " in remedy
    assert "an adapter that trains fewer weights" in remedy


def test_memory_check_false_trains_all_the_same(train, machine):
    machine(1 << 18)
    assert train(memory_check=False, max_steps=1).steps == 1


def test_auto_is_refused_where_not_even_the_longest_example_fits(train, machine):
    machine(1 << 18)
    with pytest.raises(LuthierError) as caught:
        train(max_tokens_per_device="auto")
    assert caught.value.code == "memory-too-small"


def decided(folder, name="max_tokens_per_device"):
    import json

    return json.loads((folder / "run.json").read_text())["decisions"][name]


def test_auto_takes_no_more_than_the_longest_step_has_and_says_so(train, tmp_path, rows):
    run = train(max_tokens_per_device="auto")
    found = decided(tmp_path / "run")
    assert run.steps == 3
    assert found["value"] < 8 * 64  # eight short rows
    assert "the longest step has no more" in found["reason"]


def test_auto_takes_no_more_than_makes_a_processor_faster(train, tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "x" * 400} for i in range(8)]
    train(data=rows, max_tokens_per_device="auto", device="cpu")
    found = decided(tmp_path / "run")
    assert found["value"] == 2048
    assert "more would be no faster on cpu" in found["reason"]


def test_auto_takes_what_fits_where_memory_is_short_and_trains_to_the_same_weights(train, tmp_path, machine):
    settings = {"optimizer": {"name": "sgd"}, "max_tokens_per_device": "auto"}
    whole = train(**settings, output_dir=tmp_path / "whole")
    machine(1_200_000)
    cut = train(**settings, output_dir=tmp_path / "cut")
    few, many = decided(tmp_path / "cut"), decided(tmp_path / "whole")
    assert few["value"] < many["value"]
    assert "the most that fits" in few["reason"]
    assert cut.loss_history == pytest.approx(whole.loss_history, rel=1e-5)


def test_auto_stays_what_it_was_when_the_run_goes_on_with_other_memory(train, tmp_path, machine):
    def breaks(step):
        if step == 2:
            raise ValueError("the power went")

    settings = {"max_tokens_per_device": "auto", "save_steps": 1, "async_save": False}
    machine(1_200_000)
    with pytest.raises(ValueError, match="the power went"):
        train(**settings, exact_callbacks=[luthier.on(step_ended=breaks)])
    before = decided(tmp_path / "run")
    machine(1 << 30)
    train(**settings, exact_callbacks=[])
    assert decided(tmp_path / "run") == before
    train(**settings, exact_callbacks=[], fresh=True)
    assert decided(tmp_path / "run-2")["value"] > before["value"]


def test_a_part_that_needs_weights_is_trained_with_a_word_about_it(train, tmp_path, machine):
    from luthier.builtin import Sft
    from luthier.builtin.sft import SupervisedLoss

    class Looking(SupervisedLoss):
        def __call__(self, policy, batch):
            weight = policy.model.lm_head.weight
            weight.detach().numpy()  # which a tensor without data cannot give
            return super().__call__(policy, batch)

    machine(1 << 30)
    run = train(loss=Looking(Sft()), max_tokens_per_device="auto", max_steps=1)
    found = decided(tmp_path / "run")
    assert run.steps == 1
    assert found["value"] == 4096
    assert "memory cannot be predicted" in found["reason"]


def test_batch_and_rate_may_be_auto_and_are_recorded_with_their_reasons(train, tmp_path):
    run = train(global_batch_size="auto", learning_rate="auto", adapter={"name": "lora"})
    batch, rate = (decided(tmp_path / "run", name) for name in ("global_batch_size", "learning_rate"))
    assert run.steps == 3
    assert batch["value"] == 8
    assert "24 examples" in batch["reason"]
    assert rate["value"] == pytest.approx(1e-3)
    assert "ten times" in rate["reason"]
