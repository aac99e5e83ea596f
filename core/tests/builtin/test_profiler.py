"""The profiler: time by phase, a trace that a viewer can load, and a table of operations."""

import functools
import gzip
import json

import luthier
import pytest
from luthier.builtin.profiler import FILE, FOLDER, TABLE
from luthier.runs.writing.phases import Phases
from luthier.testing.worlds import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{i} plus {j} is", "completion": str(i + j)} for i in range(4) for j in range(4)]
TRAINING = {"data", "forward", "backward", "optimizer"}


def train(folder, options=None, **changes):
    """The folder and the profile of a run of eight steps with the profiler."""
    settings = {
        "model": (tiny_model(), tiny_tokenizer()),
        "data": ROWS,
        "global_batch_size": 4,
        "num_train_epochs": 2,
        "output_dir": folder,
        "exact_callbacks": [{"name": "profiler", **(options or {})}],
        "device": "cpu",
    }
    luthier.train(**{**settings, **changes})
    return folder, json.loads((folder / FILE).read_text())


@pytest.fixture
def profiled(tmp_path):
    """`train` into `tmp_path/run`."""
    return functools.partial(train, tmp_path / "run")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A run whose fourth and fifth steps are traced."""
    return train(tmp_path_factory.mktemp("traced") / "run", {"wait": 2, "warmup": 1, "active": 2, "top": 4})


def events(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def traced_steps(path):
    names = [
        e["name"] for e in events(path) if str(e.get("name", "")).startswith("ProfilerStep#") and e.get("ph") == "X"
    ]
    return sorted({int(name.partition("#")[2]) for name in names})


def test_the_phases_of_each_step_are_all_of_its_time(profiled):
    _, found = profiled()  # no trace unless one is asked for
    assert found["trace"] is None
    assert found["steps"] == len(found["recent"]) == 8
    assert TRAINING | {"other"} <= found["phases"].keys()
    assert sum(phase["seconds"] for phase in found["phases"].values()) == pytest.approx(found["seconds"])
    assert sum(phase["share"] for phase in found["phases"].values()) == pytest.approx(1.0)
    for name in TRAINING:
        assert found["phases"][name]["seconds"] == pytest.approx(sum(step[name] for step in found["recent"]))
        assert found["phases"][name]["median"] > 0
    assert [step["step"] for step in found["recent"]] == list(range(1, 9))
    assert found["peak_memory"] > 2**20


def test_evaluation_and_saving_are_phases_of_the_step_they_follow(profiled):
    _, found = profiled({"active": 0}, eval_data=ROWS[:4], eval_steps=3, save_steps=4)
    evaluated = [step["step"] for step in found["recent"] if step.get("evaluation")]
    saved = [step["step"] for step in found["recent"] if step.get("saving")]
    assert evaluated == [3, 6, 8]
    assert saved == [4, 8]


def test_the_trace_holds_the_chosen_steps_and_their_operations(traced):
    folder, found = traced
    [path] = (folder / FOLDER).iterdir()
    assert path.name == "trace-step-00000004.json.gz"
    assert found["trace"] == str(path)
    assert len(traced_steps(path)) == 2
    spans = [e for e in events(path) if e.get("ph") == "X"]
    assert all(isinstance(e["ts"], (int, float)) and e["dur"] >= 0 and "pid" in e and "tid" in e for e in spans)
    names = {e["name"] for e in spans}
    assert any(name.startswith("aten::") for name in names)
    assert "Optimizer.step#AdamW.step" in names or any("Optimizer.step" in name for name in names)


def test_the_table_ranks_operations_by_their_own_time(traced):
    folder, found = traced
    times = [row["self_seconds"] for row in found["operations"]]
    assert len(times) == 4
    assert times == sorted(times, reverse=True)
    assert 0 < sum(row["share"] for row in found["operations"]) <= 1
    text = (folder / TABLE).read_text()
    for word in (*TRAINING, *(row["name"][:40] for row in found["operations"]), "peak memory", "perfetto"):
        assert word in text
    told = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    ranked = [line["name"] for line in told if line["event"] == "operation" and "implementation" not in line]
    assert ranked == [row["name"] for row in found["operations"]]
    [line] = [line for line in told if line["event"] == "profile"]
    assert line["steps"] == 8
    assert line["forward"].endswith("%")


def test_without_active_steps_nothing_is_traced(profiled):
    folder, found = profiled({"active": 0})
    assert not (folder / FOLDER).exists()
    assert found["operations"] == []
    assert found["trace"] is None


SLOW = [pytest.param(steps, traced, marks=pytest.mark.slow) for steps, traced in ((1, 0), (3, 1), (4, 2), (5, 3))]


@pytest.mark.parametrize(("steps", "traced"), [(2, 0), *SLOW])
def test_a_run_that_ends_within_the_schedule_keeps_what_there_is(profiled, steps, traced):
    folder, found = profiled({"wait": 1, "warmup": 1, "active": 3}, max_steps=steps)
    assert found["steps"] == steps
    if traced:
        assert len(traced_steps(folder / FOLDER / "trace-step-00000003.json.gz")) == traced
    else:
        assert found["trace"] is None


def test_a_run_that_fails_leaves_its_profile(profiled, tmp_path):
    class Failing:
        @luthier.event
        def step_ended(self, step):
            if step == 3:
                raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        profiled(exact_callbacks=[{"name": "profiler", "active": 9}, Failing()])
    assert json.loads((tmp_path / "run" / FILE).read_text())["steps"] == 3


def test_what_cannot_be_written_is_said_and_costs_no_run(profiled, tmp_path, capsys):
    class Blocking:
        @luthier.event
        def run_started(self, run):
            (run.folder / FOLDER).write_text("a file where the traces' folder would be")

    with pytest.raises(FileNotFoundError):
        profiled(exact_callbacks=[{"name": "profiler", "wait": 0, "active": 1}, Blocking(), Remover()], max_steps=3)
    assert "the trace cannot be written" in capsys.readouterr().err
    assert (tmp_path / "run" / "run.json").exists()


class Remover:
    """Takes the report away at the end: what is left is what the disk refused."""

    @luthier.event(trylast=True)
    def completed(self, run):
        (run.folder / FILE).unlink(missing_ok=True)


@pytest.mark.slow
def test_a_resumed_run_counts_its_own_steps(profiled, tmp_path):
    import os
    import signal

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    from luthier.testing.worlds import save_tiny_model

    settings = {"model": str(save_tiny_model(tmp_path / "model")), "data": rows}
    kill = luthier.on(step_ended=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None)
    with pytest.raises(BaseException, match="SIGTERM"):
        profiled(**settings, exact_callbacks=[{"name": "profiler", "active": 3}, kill])
    assert json.loads((tmp_path / "run" / FILE).read_text())["steps"] == 3
    folder, found = profiled({"active": 3}, **settings)
    assert [step["step"] for step in found["recent"]] == [4, 5, 6, 7, 8]
    assert found["trace"].endswith("trace-step-00000006.json.gz")


# the phases themselves


class Ticks:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def elapsed(self, earlier, later):
        return later - earlier


def test_a_phase_within_a_phase_is_counted_once():
    phases, clock = Phases(), Ticks()
    phases.listen(clock)
    meter = phases.meter()
    clock.now = 5.0
    with phases("backward"):
        clock.now += 1
        with phases("forward"):
            clock.now += 10
        clock.now += 2
    clock.now += 100
    with phases("forward"):
        clock.now += 20
    assert meter.take() == {"backward": 3.0, "forward": 30.0}
    assert meter.take() == {}


def test_the_wait_for_each_item_is_counted_and_their_use_is_not():
    phases, clock = Phases(), Ticks()
    phases.listen(clock)
    meter = phases.meter()

    def slow():
        for item in range(3):
            clock.now += 1
            yield item

    seen = []
    for item in phases.over("data", slow()):
        seen.append(item)
        clock.now += 50
    assert seen == [0, 1, 2]
    assert meter.take() == {"data": 3.0}


def test_two_meters_take_nothing_from_each_other_and_a_long_run_keeps_few_marks():
    clock = Ticks()
    phases = Phases(clock)
    early = phases.meter()
    for _ in range(1000):
        with phases("data"):
            clock.now += 1
    late = phases.meter()
    assert len(phases._marks) < 256
    with phases("data"):
        clock.now += 5
    assert (early.take(), late.take()) == ({"data": 1005.0}, {"data": 5.0})
    assert (early.numbers(), late.take()) == ({}, {})


def test_a_phase_that_raises_is_closed():
    phases, clock = Phases(), Ticks()
    phases.listen(clock)
    meter = phases.meter()
    with pytest.raises(ValueError, match="x"), phases("data"):
        clock.now += 4
        raise ValueError("x")
    clock.now += 9
    assert meter.take() == {"data": 4.0}


def test_nothing_is_counted_before_somebody_listens():
    phases = Phases()
    meter = phases.meter()
    with phases("data"):
        pass
    assert list(phases.over("data", [1, 2])) == [1, 2]
    assert meter.take() == {}
    assert phases("forward") is phases("backward")
