"""A survey reads the metrics once, in columns or line by line with the same result, and runs of any length in little memory."""

import json
import math
import subprocess
import sys
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from luthier.runs import metric_survey
from luthier.runs.find import all_runs
from luthier.runs.metric_survey import KEPT, Curve, survey_metrics
from luthier.runs.metrics_file import append_line, read_metrics

NUMBERS = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False))
LINE = st.fixed_dictionaries({"step": st.integers(0, 99)}, optional={
    "loss": NUMBERS, "eval_loss": NUMBERS, "tokens_per_second": NUMBERS, "other": st.one_of(NUMBERS, st.booleans(), st.text())
})  # fmt: skip
RAW = st.one_of(LINE.map(lambda line: json.dumps(line).encode()), st.binary(max_size=20))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.one_of(LINE.map(lambda line: json.dumps(line).encode()), RAW), max_size=12),
    block=st.integers(1, 300),
)
def test_columns_and_lines_give_the_same_ranges_and_curves(tmp_path, lines, block):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    by_line, by_column = survey_metrics(path), survey_metrics(path, block)
    assert {n: r.to_dict() for n, r in by_column.ranges.items()} == {n: r.to_dict() for n, r in by_line.ranges.items()}
    for name in metric_survey.DRAWN:
        assert by_column.series(name) == by_line.series(name)


def test_numbers_stand_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0, "grad_norm": 2.0, "a": 3.0, "z": 4.0, "b": 5.0}\n' * 3)
    assert list(survey_metrics(path, 10).ranges) == ["loss", "grad_norm", "a", "z", "b"]


@pytest.mark.parametrize("again", [1000, 1001])
def test_steps_that_a_resumed_run_repeats_count_once_in_a_long_curve(again):
    curve = Curve()
    curve.add(list(range(1, 100_001)), [5.0] * 100_000)
    curve.add(list(range(again, 100_000)), [1.0] * (100_000 - again))
    assert {value for step, value in curve.series() if step >= again} == {1.0}
    assert {value for step, value in curve.series() if step < again - 2} == {5.0}


@pytest.mark.parametrize("count", [KEPT, 3 * KEPT + 5])
def test_a_long_curve_is_the_mean_of_neighbours_and_ends_where_the_run_does(count):
    curve = Curve()
    for first in range(1, count + 1, 1000):
        steps = list(range(first, min(first + 1000, count + 1)))
        curve.add(steps, [float(step) for step in steps])
    series = curve.series()
    assert len(series) <= KEPT + 1
    width = curve.each
    assert width == (1 if count == KEPT else 4)
    assert series[0] == (1, (1 + width) / 2)
    assert sum(value for _, value in series[:-1]) == sum(range(1, (len(series) - 1) * width + 1)) / width
    assert series[-1][0] > count - width


@pytest.mark.parametrize("again", [None, 5, 2 * KEPT + 7])
def test_arrays_and_lists_of_points_make_the_same_curve(again):
    steps = [*range(1, 3 * KEPT), *(() if again is None else range(again, 3 * KEPT + 100))]
    values = [step * 0.5 for step in steps]
    by_list, by_array, at_once = Curve(), Curve(), Curve()
    at_once.add(steps, values)
    for first in range(0, len(steps), 7001):
        part = slice(first, first + 7001)
        by_list.add(steps[part], values[part])
        by_array.add(np.array(steps[part]), np.array(values[part]))
    assert by_list.series() == by_array.series() == at_once.series()
    assert len(by_list.series()) <= KEPT + 1


def test_a_line_that_a_kill_cut_in_half_stays_out_of_the_way(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1, "loss": 2.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    append_line(path, {"step": 2, "loss": math.nan})
    append_line(path, {"step": 3, "loss": 1.0})
    assert path.read_bytes().count(b"\n") == 4
    assert "cut short by a kill" in capsys.readouterr().err
    found = read_metrics(path)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert math.isnan(found[1]["loss"])
    assert "left out" in capsys.readouterr().err
    assert survey_metrics(path).series("loss") == [(1, 2.0), (3, 1.0)]


def write_metrics(path, count):
    with path.open("w") as file:
        for step in range(1, count + 1):
            numbers = {"loss": 3.0 / (1 + step / 1000), "grad_norm": 0.5, "learning_rate": 1e-4, "epoch": step / count,
                       "tokens": 4096, "supervised_tokens": 2048, "total_tokens": 4096 * step, "samples": 8 * step,
                       "tokens_per_second": 10000.0 + step % 7, "peak_memory": 123456789, "elapsed": 0.4 * step,
                       "skipped_steps": 0}  # fmt: skip
            file.write(json.dumps({"step": step, **numbers}) + "\n")


@pytest.mark.slow
def test_a_million_lines_take_little_time_and_memory(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", 10**6)
    code = (
        "import resource, sys, time; from pathlib import Path; import pyarrow.json, numpy\n"
        "from luthier.runs.metric_survey import survey_metrics\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; began = time.process_time()\n"
        "survey = survey_metrics(Path(sys.argv[1])); seconds = time.process_time() - began\n"
        "print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(survey.series('loss')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "metrics.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kilobytes, points = (float(word) for word in done.stdout.split())
    assert seconds < 2.5  # of processor time, which other work on the machine lengthens: 1.5 s where it is quiet
    assert kilobytes < 120_000
    assert points <= KEPT + 1


@pytest.mark.slow
def test_a_thousand_runs_are_listed_in_half_a_second(tmp_path):
    for number in range(1000):
        folder = tmp_path / f"run-{number:04d}"
        folder.mkdir()
        record = {"run_id": f"2026-{number:04d}", "state": "completed", "step": 100, "parts": [{"kind": "adapter"}] * 8,
                  "decisions": {str(i): {"value": i, "why": "x" * 80} for i in range(20)}}  # fmt: skip
        (folder / "run.json").write_text(json.dumps(record))
        write_metrics(folder / "metrics.jsonl", 300)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        summaries = [run.summary() for run in all_runs(tmp_path)]
        seconds.append(time.process_time() - began)
    assert len(summaries) == 1000
    assert {s["step"] for s in summaries} == {300}
    assert min(seconds) < 0.5
