"""The process while it trains: threads, float32 products and allocator, and everything as before when it is over."""

import os

import luthier
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from luthier.errors import LuthierError
from luthier.hardware import allocator, threads
from luthier.hardware import matmul as products
from luthier.hardware.process_settings import Process
from luthier.hardware.threads import Cores, Glance, choose_threads
from luthier.runs.writing.record import read_record


@pytest.mark.parametrize(
    ("cores", "hidden", "ranks", "expected"),
    [
        (Cores(physical=8), 4096, 1, 8),
        (Cores(physical=8), 144, 1, 1),
        (Cores(physical=8, quota=2.5), 4096, 1, 2),
        (Cores(physical=8, quota=0.5), 4096, 1, 1),
        (Cores(physical=8, busy=0.5), 4096, 1, 4),
        (Cores(physical=8, busy=1.0), 4096, 1, 1),
        (Cores(physical=8), 4096, 4, 2),
        (Cores(physical=2), 4096, 4, 1),
    ],
)
def test_threads_are_the_free_physical_cores(cores, hidden, ranks, expected):
    assert choose_threads(cores, hidden, ranks)[0] == expected


@given(
    physical=st.integers(1, 256), quota=st.none() | st.floats(0.1, 512), busy=st.floats(0, 1),
    hidden=st.integers(1, 9999), ranks=st.integers(1, 16),
)  # fmt: skip
def test_there_is_always_a_thread_and_never_more_than_cores(physical, quota, busy, hidden, ranks):
    count, reason = choose_threads(Cores(physical=physical, quota=quota, busy=busy), hidden, ranks)
    assert 1 <= count <= physical
    assert count == 1 or quota is None or count <= quota
    assert reason


def group(system, path, **files):
    folder = system / "fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/job/step\n", {"job/step": {"cpu__max": "max 100000"}, "job": {"cpu__max": "150000 100000"}}, 1.5),
        ("0::/job/step\n", {"job/step": {"cpu__max": "400000 100000"}, "job": {"cpu__max": "150000 100000"}}, 1.5),
        ("0::/\n", {"": {"cpu__max": "max 100000"}}, None),
        ("4:cpu,cpuacct:/box\n", {"cpu/box": {"cpu__cfs_quota_us": "250000", "cpu__cfs_period_us": "100000"}}, 2.5),
        ("4:cpu:/box\n3:memory:/box\n", {"cpu/box": {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}}, None),
        ("", {}, None),
    ],
)
def test_the_control_groups_quota_is_the_least_of_its_parents(tmp_path, lines, files, expected):
    proc, system = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(lines)
    for path, held in files.items():
        group(system, path, **held)
    assert threads.quota(proc, system) == expected


def test_what_this_process_does_is_not_taken_for_others_work():
    began = Glance()
    while Glance().at - began.at < 0.3:
        sum(range(10_000))
    others = began.busy()
    assert 0.0 <= others <= 1.0
    assert others <= 1.0 - 0.5 * (sum(os.times()[:4]) - began.ours) / (0.3 * len(threads.allowed_processors()))


def test_a_short_glance_says_nothing():
    assert Glance().busy() == 0.0


def test_products_are_as_exact_by_either_library_or_the_other_is_not_used():
    setting, reason = products.choose_matmul(4096)
    assert products.error_of(setting) < products.EXACT
    assert reason
    assert products.choose_matmul(144)[0] == products.DEFAULT


def test_freed_memory_is_kept_only_where_the_library_and_the_model_are_such():
    assert not allocator.choose_keeping(32)[0]
    with allocator.keeping_memory(allocator.choose_keeping(4096)[0]):
        kept = torch.zeros(1 << 22)
    assert float(kept.sum()) == 0.0


def test_everything_is_as_before_when_the_run_is_over():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with Process(threads=before[0] + 1, float32_products="medium", keeps_memory=True).applied():
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (before[0] + 1, "medium")
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


class _Watcher:
    def __init__(self):
        self.seen = set()

    @luthier.event
    def step_ended(self):
        self.seen.add((torch.get_num_threads(), torch.get_float32_matmul_precision()))


@pytest.mark.parametrize(
    ("variable", "asked", "expected"), [(None, None, 1), ("2", None, "torch"), ("2", 3, 3), (None, 3, 3)]
)
def test_the_recipe_wins_over_the_variable_and_that_over_the_rule(
    train, tmp_path, monkeypatch, variable, asked, expected
):
    """A tiny model gets one thread; OMP_NUM_THREADS is what torch has made of it."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    expected = torch.get_num_threads() if expected == "torch" else expected
    watcher = _Watcher()
    train(num_threads=asked, exact_callbacks=[watcher], max_steps=1)
    assert watcher.seen == {(expected, torch.get_float32_matmul_precision())}
    assert read_record(tmp_path / "run")["decisions"]["num_threads"]["value"] == expected


def test_a_count_of_another_machine_is_taken_only_where_there_are_so_many(train, tmp_path, monkeypatch, capsys):
    from luthier.runs.writing.record import write_record

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with pytest.raises(LuthierError):
        train(max_steps=2, max_grad_norm=1.0, learning_rate=1e30)  # a run that stops
    record = read_record(tmp_path / "run")
    record["decisions"]["num_threads"]["value"] = 100_000
    write_record(tmp_path / "run", record)
    with pytest.raises(LuthierError):
        train(max_steps=2, max_grad_norm=1.0, learning_rate=1e30)
    assert "decided anew" in capsys.readouterr().err
    assert read_record(tmp_path / "run")["decisions"]["num_threads"]["value"] == 1
