"""What the profiler costs a run: its default, and with a trace, beside the same run without it."""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.speed.table import Row
from tests.speed.work import SIZES, blocks, llama, tokenizer

ROUNDS = 3
SIDES: dict[str, list[Any]] = {
    "none": [],
    "profiler": ["profiler"],
    "profiler with a trace of 3 steps": [{"name": "profiler", "active": 3}],
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    parser.add_argument("--size", choices=sorted(SIZES), default="3m", help="of the model")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    """`ours` is the run with the profiler, `peer` the one without; the sides take turns, and the best round counts."""
    model, rows = llama(4096, **SIZES[arguments.size]), blocks(arguments.steps * 4, 64)
    spans: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(1 + (arguments.rounds or ROUNDS)):
        for name, callbacks in SIDES.items():
            spans[name].append(_run(copy.deepcopy(model), rows, callbacks, arguments))
    least = {name: min(seconds[1:]) for name, seconds in spans.items()}
    for name in list(SIDES)[1:]:
        share = {"share": least[name] / least["none"] - 1, "clock": arguments.clock}
        case = f"{arguments.steps} steps, {arguments.size}, {name}"
        yield Row.cost(case, least[name], least["none"], "s of the run", more=share)
    step = 1e6 * least["none"] / arguments.steps
    own = 1e6 * _seconds_of_events()
    yield Row.cost("a step: the profiler's own code, and the run", own, step, "us", more={"share": own / step})


def _seconds_of_events(count: int = 5000) -> float:
    """Seconds that the profiler takes of a step with four micro-batches and nothing in them."""
    from luthier.builtin import Profiler
    from luthier.builtin.profiler import PhaseProfiler
    from luthier.runs.writing.phases import HostClock, Phases

    with tempfile.TemporaryDirectory() as folder:
        phases, callback = Phases(HostClock()), PhaseProfiler(Profiler())
        run = SimpleNamespace(folder=Path(folder), settings={"device": "cpu"}, phases=phases, total_steps=None)
        callback.run_started(run)
        began = time.process_time()
        for step in range(count):
            callback.step_started(run, step)
            for phase in ("data", *("forward", "backward") * 4, "optimizer"):
                with phases(phase):
                    pass
            callback.step_ended(run, step, {"peak_memory": 1.0})
        return (time.process_time() - began) / count


def _run(model: Any, rows: Any, callbacks: list[Any], arguments: argparse.Namespace) -> float:
    import luthier

    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        began = clock()
        luthier.train(model=(model, tokenizer()), data=list(rows), adapter="lora", global_batch_size=4,
                      max_steps=arguments.steps, exact_callbacks=callbacks, save_strategy="no", save_final=False,
                      output_dir=Path(folder) / "run", device="cpu", memory_check=False)  # fmt: skip
        return clock() - began
