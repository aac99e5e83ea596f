"""GPU safety: the state machine, and the callback over a fake nvidia-smi that stands where the real one would."""

import os
import stat
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.builtin import GpuSafety
from luthier.builtin.gpu_safety import Guard, Guardian
from luthier.builtin.gpu_sensors import NvidiaSmi, Nvml, Reading, find_sensor, parse
from luthier.errors import LuthierError
from luthier.recipe import Recipe, resolve_parts
from luthier.recipe.checks.soundness import check_parts
from luthier.testing import expect_error

OPTIONS = GpuSafety(pause_seconds=30, max_pause_seconds=600, max_pauses=3, max_power=300)


def at(temperature, power=100.0):
    return [
        Reading(uuid="GPU-a", temperature=40.0, power=90.0),
        Reading(uuid="GPU-b", temperature=temperature, power=power),
    ]


def states(readings, options=OPTIONS, every=10.0):
    guard = Guard(options)
    return [guard.see(index * every, reading) for index, reading in enumerate(readings)], guard


def test_a_cool_gpu_is_only_watched():
    seen, guard = states([at(t) for t in (50, 70, 85)])
    assert seen == ["watching"] * 3
    assert guard.pauses == 0


def test_it_pauses_above_the_limit_and_goes_on_only_below_the_lower_one():
    seen, guard = states([at(86), at(80), at(76), at(75), at(80)])
    assert seen == ["paused", "paused", "paused", "watching", "watching"]
    assert guard.pauses == 1


def test_a_pause_lasts_at_least_so_long():
    seen, _ = states([at(86), at(50), at(50), at(50)])
    assert seen == ["paused", "paused", "paused", "watching"]


def test_power_pauses_too():
    seen, guard = states([at(50, 301), at(50, 60), at(50, 60), at(50, 60)])
    assert seen == ["paused", "paused", "paused", "watching"]
    seen, guard = states([at(50, 900)], GpuSafety())
    assert seen == ["watching"]


def test_a_pause_that_does_not_help_ends_the_run():
    seen, guard = states([at(86)] * 7, every=100.0)
    assert seen == ["paused"] * 7
    assert guard.see(701.0, at(80)) == "aborted"
    assert "600 s has not been enough: a GPU is at 86 °C" in guard.reason


def test_one_pause_too_many_ends_the_run():
    seen, guard = states([at(86), at(60)] * 4, every=100.0)
    assert seen == ["paused", "watching"] * 3 + ["aborted", "aborted"]
    assert "after 3 pauses" in guard.reason


@pytest.mark.parametrize("before", [[], [86]])
def test_heat_beyond_the_last_limit_ends_the_run_at_once_also_in_a_pause(before):
    seen, guard = states([at(t) for t in (*before, 95)])
    assert seen[-1] == "aborted"
    assert guard.reason == "a GPU is at 95 °C; the limit is 95"


def test_without_readings_a_pause_goes_on_until_it_is_too_long():
    seen, _ = states([at(86), [], [], [], []], every=200.0)
    assert seen == ["paused", "paused", "paused", "paused", "aborted"]


@given(st.lists(st.tuples(st.floats(20, 94), st.floats(0, 500)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_it_trains_only_while_it_is_within_its_limits_and_never_after_an_abort(pairs):
    guard, aborted = Guard(OPTIONS), False
    for index, (temperature, power) in enumerate(pairs):
        state = guard.see(index * 25.0, at(temperature, power))
        if state == "watching":
            assert not aborted
            assert temperature <= 85
            assert power <= 300
        assert guard.pauses <= 3
        aborted |= state == "aborted"
        assert (state == "aborted") == aborted


def test_the_lines_of_nvidia_smi_are_read_with_what_it_does_not_tell():
    text = "GPU-aa, 54, 120.31\nGPU-bb, [N/A], [Not Supported]\n\nNVIDIA-SMI has failed\n"
    assert parse(text) == [
        Reading(uuid="GPU-aa", temperature=54.0, power=120.31),
        Reading(uuid="GPU-bb", temperature=None, power=None),
    ]


# the callback over a fake nvidia-smi


class Clock:
    """Seconds that pass only where somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """An nvidia-smi that answers with the next of its lines, and with the last one from then on."""
    lines = tmp_path / "lines"
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable} -S\nimport sys\nlines = open({str(lines)!r}).read().splitlines()\n"
        f"assert '--query-gpu=uuid,temperature.gpu,power.draw' in sys.argv\nprint(lines[0].replace(';', chr(10)))\n"
        f"open({str(lines)!r}, 'w').write(chr(10).join(lines[1:] or lines))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))
    return lambda *temperatures: lines.write_text("\n".join(f"GPU-a, {t}, 100" for t in temperatures))


class FakeRun(SimpleNamespace):
    """What the callback asks of a run."""

    def __init__(self):
        super().__init__(step=0, signal=None, stop_reason=None, saves=0, settings={"device": "cuda"})

    def request_save(self):
        self.saves += 1


def guarded(options=None):
    clock, run = Clock(), FakeRun()
    guardian = Guardian(options or GpuSafety(pause_seconds=20), clock=clock, sleep=clock.sleep)
    guardian.run_started(run)
    return guardian, clock, run


def steps(guardian, clock, run, count):
    """Steps of three seconds; a query that one of them began is answered by the next."""
    for _ in range(count):
        run.step += 1
        clock.now += 3.0
        guardian.step_ended(run)
        if guardian.sensor.process is not None:
            guardian.sensor.process.wait()


def test_a_hot_gpu_pauses_the_run_between_steps_and_a_cool_one_lets_it_go_on(smi, capsys):
    smi(50, 90, 88, 80, 74, 60)
    guardian, clock, run = guarded()
    steps(guardian, clock, run, 6)
    assert guardian.guard.pauses == 1
    assert guardian.guard.state == "watching"
    assert clock.now >= 18 + 20
    told = capsys.readouterr().err
    assert "paused" in told
    assert "a GPU is at 90 °C; the limit is 85" in told
    assert "the hottest GPU is at 60 °C" in told
    assert run.saves == 0


def test_an_abort_asks_for_a_checkpoint_and_fails_once_that_is_written(smi, capsys):
    smi(50, 99)
    guardian, clock, run = guarded()
    guardian.saved()
    steps(guardian, clock, run, 6)
    assert run.saves == 1
    assert "gpu safety ends the run after a checkpoint" in capsys.readouterr().err
    with pytest.raises(LuthierError) as caught:
        guardian.saved()
    assert (caught.value.code, caught.value.where, caught.value.exit_status) == ("device-unsafe", "gpu_safety", 75)
    assert [number in caught.value.problem for number in ("99", "95")] == [True, True]


def test_the_training_is_not_kept_waiting_for_a_query(smi, tmp_path):
    os.mkfifo(tmp_path / "lines")  # nvidia-smi answers only once somebody writes
    guardian, clock, run = guarded()
    for _ in range(5):
        run.step += 1
        clock.now += 3.0
        guardian.step_ended(run)
    waiting = guardian.sensor.process
    assert waiting.poll() is None
    waiting.kill()
    waiting.wait()
    guardian.step_ended(run)
    assert guardian.guard.state == "watching"


def test_between_two_queries_lie_poll_seconds(smi):
    smi(50)
    guardian, clock, run = guarded(GpuSafety(poll_seconds=60))
    asked = []
    guardian.sensor.ask = lambda ask=guardian.sensor.ask: (asked.append(clock.now), ask())
    steps(guardian, clock, run, 50)
    assert asked == [3.0, 63.0, 123.0]


def test_a_signal_is_heard_in_a_pause(smi):
    smi(90)
    guardian, clock, run = guarded(GpuSafety(poll_seconds=5, max_pause_seconds=10**6))

    def interrupt(seconds):
        clock.now += seconds
        run.signal = 15 if clock.now > 40 else None

    guardian.sleep = interrupt
    steps(guardian, clock, run, 3)
    assert guardian.guard.state == "paused"
    assert clock.now < 60


def test_sensors_that_tell_nothing_are_said_once(smi, capsys):
    smi("[N/A]")
    guardian, clock, run = guarded()
    guardian.sensor.uuids = {"GPU-other"}
    steps(guardian, clock, run, 20)
    assert capsys.readouterr().err.count("gpu safety is blind") == 1


def test_only_the_gpus_of_the_run_count(smi, tmp_path):
    (tmp_path / "lines").write_text("GPU-a, 50, 1;GPU-b, 99, 1")
    sensor = NvidiaSmi({"GPU-a"})
    sensor.ask()
    assert [r.uuid for r in sensor.answer(wait=True)] == ["GPU-a"]


def test_a_machine_without_nvidia_smi_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with expect_error("dependency-missing", "gpu_safety") as caught:
        Guardian(GpuSafety()).run_started(FakeRun())
    assert caught.value.code == "dependency-missing"


def test_a_run_on_a_device_without_gpu_is_refused_before_it_begins():
    recipe = Recipe.from_dict({"model": "demo", "data": "x.jsonl", "exact_callbacks": ["gpu_safety"]})
    with expect_error("part-incompatible", None, "'gpu_safety'"):
        check_parts(recipe, resolve_parts(recipe), "cpu")
    check_parts(recipe, resolve_parts(recipe), "cuda")


@pytest.mark.parametrize("limits", [{"resume_temperature": 85}, {"max_temperature": 96}, {"abort_temperature": 80}])
def test_limits_out_of_order_are_refused(limits):
    with expect_error("recipe-conflict", "GpuSafety", "resume_temperature", "max_temperature") as caught:
        GpuSafety(**limits)
    assert caught.value.code == "recipe-conflict"


def test_a_world_of_several_machines_is_told_that_only_the_first_is_watched(smi, monkeypatch, capsys):
    smi(50)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "16")
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "8")
    guarded()
    assert "the first machine only" in capsys.readouterr().err


class Library:
    """NVML's bindings over two GPUs of our making, at the far side of which a driver would be."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{'ab'[handle]}"

    def nvmlDeviceGetTemperature(self, handle, kind):
        return (61, 72)[handle]

    def nvmlDeviceGetPowerUsage(self, handle):
        if handle == 1:
            raise self.NVMLError
        return 120_500


def test_nvml_reads_degrees_and_watts_and_none_for_what_a_gpu_does_not_tell():
    known = [Reading(uuid="GPU-a", temperature=61.0, power=120.5), Reading(uuid="GPU-b", temperature=72.0, power=None)]
    for sensor, told in ((Nvml(Library()), known), (Nvml(Library(), {"GPU-b"}), known[1:])):
        sensor.ask()
        assert sensor.answer() == told


def test_nvml_too_is_asked_every_poll_seconds_and_each_reading_counts_once():
    library, clock, run = Library(), Clock(), FakeRun()
    read, asked = library.nvmlDeviceGetPowerUsage, []
    library.nvmlDeviceGetPowerUsage = lambda handle: (asked.append(clock.now), read(handle))[1]
    options, seen = GpuSafety(poll_seconds=10), []

    class Watched(Guard):
        def see(self, now, readings):
            seen.append(now)
            return super().see(now, readings)

    guardian = Guardian(options, sensor=Nvml(library), guard=Watched(options), clock=clock, sleep=clock.sleep)
    for _ in range(100):
        guardian.step_ended(run)
        clock.now += 0.5
    assert asked[::2] == asked[1::2] == [0.0, 10.0, 20.0, 30.0, 40.0]  # two GPUs
    assert seen == [0.5, 10.5, 20.5, 30.5, 40.5]


def test_where_nvml_has_lost_a_gpu_nvidia_smi_is_asked(smi, monkeypatch):
    class Lost(Library):
        NVMLError = Library.NVMLError

        def nvmlInit(self):
            pass

        def nvmlDeviceGetHandleByIndex(self, index):
            raise self.NVMLError("GPU is lost")

    smi(50)
    monkeypatch.setitem(sys.modules, "pynvml", Lost())
    assert isinstance(find_sensor(), NvidiaSmi)


def test_nvml_names_are_those_of_its_bindings():
    bindings = pytest.importorskip("pynvml")
    names = [name for name in vars(Library) if not name.startswith("__")]
    assert [name for name in names if not hasattr(bindings, name)] == []


def test_where_nvml_has_no_driver_nvidia_smi_is_asked(smi):
    smi(50)
    assert isinstance(find_sensor(), NvidiaSmi)
