"""Defaults that depend on hardware and data: one pure function over made-up hardware."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.memory.suggestions import Hardware, Task, suggest_values

GB = 10**9
TASK = {"parameters": 8_030_261_248, "trainable": 40_000_000, "examples": 5_000}


def values(hardware, **changes):
    return {s.option: s.value for s in suggest_values(Hardware(**hardware), Task(**{**TASK, **changes}))}


@pytest.mark.parametrize(
    ("memory", "examples"),
    [(8, 1), (12, 1), (16, 2), (15.8, 2), (24, 4), (25.3, 4), (32, 6), (40, 6), (48, 8), (141, 8)],
)
def test_examples_of_a_micro_batch_by_the_gpus_memory(memory, examples):
    assert values({"kind": "cuda", "memory": int(memory * GB)})["per_device_train_batch_size"] == examples


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_other_devices_take_one_example_at_a_time(kind):
    assert values({"kind": kind, "memory": 512 * GB})["per_device_train_batch_size"] == 1


@pytest.mark.parametrize(
    ("examples", "batch"), [(1, 8), (800, 8), (1_600, 16), (7_473, 64), (1_000_000, 64), (None, 32)]
)
def test_the_global_batch_makes_about_a_hundred_steps_an_epoch_within_bounds(examples, batch):
    assert values({"kind": "cpu", "memory": GB}, examples=examples)["global_batch_size"] == batch


@pytest.mark.parametrize(
    ("parameters", "trainable", "rate"),
    [
        (8_030_261_248, 8_030_261_248, 2e-5),
        (8_030_261_248, 40_000_000, 2e-4),
        (70_553_706_496, 70_553_706_496, 8e-6),
        (134_515_008, 134_515_008, 1e-4),
        (134_515_008, 2_000_000, 1e-3),
        (30_000, 30_000, 1e-4),
    ],
)
def test_the_rate_falls_with_size_and_is_ten_times_as_high_where_little_trains(parameters, trainable, rate):
    found = values({"kind": "cpu", "memory": GB}, parameters=parameters, trainable=trainable)["learning_rate"]
    assert found == pytest.approx(rate)


@pytest.mark.parametrize(("examples", "rank"), [(100, 8), (5_000, 16), (50_000, 32), (500_000, 64), (None, 16)])
def test_the_rank_grows_with_what_the_rows_teach(examples, rank):
    assert values({"kind": "cpu", "memory": GB}, examples=examples)["adapter.r"] == rank


@settings(max_examples=60, deadline=None)
@given(
    memory=st.integers(1, 200 * GB),
    ranks=st.integers(1, 64),
    examples=st.one_of(st.none(), st.integers(1, 10**8)),
    parameters=st.integers(10**4, 10**12),
    share=st.floats(1e-6, 1.0),
)
def test_every_value_has_a_reason_and_the_batch_is_shared_and_accumulated_whole(
    memory, ranks, examples, parameters, share
):
    hardware = Hardware(kind="cuda", memory=memory, ranks=ranks)
    task = Task(parameters=parameters, trainable=max(1, int(share * parameters)), examples=examples)
    found = suggest_values(hardware, task)
    assert found == suggest_values(hardware, task)
    assert all(s.reason for s in found)
    named = {s.option: s.value for s in found}
    batch, own = named["global_batch_size"], named["per_device_train_batch_size"]
    assert batch % ranks == 0
    assert named["gradient_accumulation_steps"] * own * ranks >= batch
    assert (named["gradient_accumulation_steps"] - 1) * own * ranks < batch
    assert 0 < named["learning_rate"] <= 1e-3
