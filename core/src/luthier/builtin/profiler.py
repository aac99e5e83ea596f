"""The profiler: where the time of each step goes, the peak of memory, and a Chrome trace of a few steps."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

from luthier.builtin import Profiler
from luthier.logs import get_logger
from luthier.plugins.events import event

log = get_logger()
FILE: Final = "profile.json"
TABLE: Final = "profile.txt"
FOLDER: Final = "profile"
OWN: Final = "profiler"  # the phase of starting the tracer and writing the trace
OTHER: Final = "other"  # the phase of callbacks, logging, and time that no phase claims
RECENT: Final = 2000  # steps whose times are stored one by one
TOLD: Final = 5  # the most operations in the log


class PhaseProfiler:
    """A step's time is that from its beginning to the next one's: evaluation and saving are those that follow it."""

    def __init__(self, options: Profiler) -> None:
        self.options = options
        self.totals: dict[str, float] = {}
        self.steps: deque[dict[str, float]] = deque(maxlen=RECENT)
        self.count = 0
        self.peak_memory = 0.0
        self.began = 0.0
        self.step: int | None = None  # the step that is under way
        self.tracer: Any = None
        self.traced_from = self.ended = 0  # the first step in the trace, and the last step that has ended
        self.trace: Path | None = None
        self.operations: list[dict[str, Any]] = []
        self.folder: Path | None = None
        self.cuda = False
        self.meter: Any = None  # the meter of the run's phases

    @event
    def run_started(self, run: Any) -> None:
        self._open(run)

    @event
    def resumed(self, run: Any) -> None:
        self._open(run)

    @event
    def step_started(self, run: Any, step: int) -> None:
        self._close_step(run)
        self.step, self.began = step, time.perf_counter()
        if self.options.active and self.tracer is None and self.trace is None and self.count == 0:
            self.traced_from = step + self.options.wait + self.options.warmup
            with run.phases(OWN):
                self._trace()

    @event
    def step_ended(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        self.peak_memory = max(self.peak_memory, metrics.get("peak_memory", 0.0))
        self.ended = step
        with run.phases(OWN):
            if self.tracer is not None and step != run.total_steps:
                self.tracer.step()
            if self.operations or step == run.total_steps:  # nothing is traced after this step
                self._stop_trace()

    @event
    def stopped(self, run: Any) -> None:
        self._end(run)

    @event
    def completed(self, run: Any) -> None:
        self._end(run)

    @event
    def failed(self, run: Any) -> None:
        self._end(run)

    def report(self) -> dict[str, Any]:
        """Return what profile.json holds. Seconds; `share` is of the time of all steps."""
        whole = sum(self.totals.values())
        phases = {
            name: {
                "seconds": seconds,
                "share": seconds / whole if whole else 0.0,
                "median": median(step.get(name, 0.0) for step in self.steps),
            }
            for name, seconds in sorted(self.totals.items(), key=lambda item: -item[1])
        }
        return {
            "steps": self.count,
            "seconds": whole,
            "phases": phases,
            "peak_memory": self.peak_memory,
            "trace": None if self.trace is None else str(self.trace),
            "operations": self.operations,
            "recent": list(self.steps),
        }

    def _open(self, run: Any) -> None:
        from luthier.hardware.devices import choose_device
        from luthier.runs.writing.phases import choose_clock

        device = choose_device(run.settings["device"]).type
        self.folder, self.cuda = run.folder, device == "cuda"
        run.phases.listen(choose_clock(device))
        self.meter = run.phases.meter()

    def _close_step(self, run: Any) -> None:
        """Store the time of the step under way, by phase."""
        if self.step is None:
            self.meter.take()  # drops the times before the first step
            return
        spent, whole = self.meter.take(), time.perf_counter() - self.began
        spent[OTHER] = max(whole - sum(spent.values()), 0.0)
        for name, seconds in spent.items():
            self.totals[name] = self.totals.get(name, 0.0) + seconds
        self.steps.append({"step": self.step, **spent})
        self.step, self.count = None, self.count + 1

    def _trace(self) -> None:
        """Begin torch's own profiler, which waits, warms up, and records as its schedule says."""
        from torch.profiler import ProfilerActivity, profile, schedule

        options = self.options
        plan = schedule(wait=options.wait, warmup=options.warmup, active=options.active, repeat=1)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self.tracer = profile(activities=kinds, schedule=plan, on_trace_ready=self._write_trace)
        self.tracer.start()

    def _stop_trace(self) -> None:
        tracer, self.tracer = self.tracer, None
        if tracer is not None:
            tracer.stop()

    def _write_trace(self, tracer: Any) -> None:
        if self.folder is None or self.ended < self.traced_from:  # the run has ended before the first traced step
            return
        path = self.folder / FOLDER / f"trace-step-{self.traced_from:08d}.json.gz"
        self.operations = operations(tracer.key_averages(), self.options.top, cuda=self.cuda)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tracer.export_chrome_trace(str(path))
            self.trace = path
        except OSError as error:  # a full disk must not end the run
            log.warning("the trace cannot be written", path=str(path), error=str(error))

    def _end(self, run: Any) -> None:
        if self.folder is None:  # the run failed before it began
            return
        self._stop_trace()
        self._close_step(run)
        if self.count == 0:
            return
        report = self.report()
        try:
            (self.folder / FILE).write_text(json.dumps(report, indent=1), "utf-8")
            (self.folder / TABLE).write_text(table(report), "utf-8")
        except OSError as error:
            log.warning("the profile cannot be written", folder=str(self.folder), error=str(error))
        _tell(report)


def operations(averages: Any, top: int, *, cuda: bool) -> list[dict[str, Any]]:
    """Return the operations with the most time of their own, on the GPU with `cuda`, else on the processor. Seconds."""
    rows = [
        {
            "name": row.key,
            "calls": row.count,
            "self_seconds": (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6,
            "self_cpu_seconds": row.self_cpu_time_total / 1e6,
        }
        for row in averages
        if not row.key.startswith("ProfilerStep")
    ]
    whole = sum(row["self_seconds"] for row in rows) or 1.0
    rows = sorted(rows, key=lambda row: -row["self_seconds"])[:top]
    return [{**row, "share": row["self_seconds"] / whole} for row in rows]


def table(report: Mapping[str, Any]) -> str:
    """Return the report as text: phases, then operations."""
    memory = f"{report['peak_memory'] / 2**20:,.0f} MiB"
    lines = [f"{report['steps']} steps, {report['seconds']:.2f} s, peak memory {memory}", ""]
    lines += [f"{'phase':<12}{'seconds':>10}{'share':>8}{'median ms':>11}"]
    for name, phase in report["phases"].items():
        lines += [f"{name:<12}{phase['seconds']:>10.3f}{phase['share']:>8.1%}{phase['median'] * 1e3:>11.2f}"]
    if report["operations"]:
        lines += ["", f"{'operation':<52}{'calls':>8}{'self ms':>10}{'share':>8}"]
    for row in report["operations"]:
        lines += [f"{row['name'][:50]:<52}{row['calls']:>8}{row['self_seconds'] * 1e3:>10.2f}{row['share']:>8.1%}"]
    return "\n".join([*lines, "", f"trace: {report['trace']} (open it in ui.perfetto.dev)" if report["trace"] else ""])


def _tell(report: Mapping[str, Any]) -> None:
    shares = {name: f"{phase['share']:.1%}" for name, phase in report["phases"].items()}
    log.info("profile", steps=report["steps"], seconds=round(report["seconds"], 2), **shares)
    for row in report["operations"][:TOLD]:
        milliseconds, share = round(row["self_seconds"] * 1e3, 2), f"{row['share']:.1%}"
        log.info("operation", name=row["name"], self_ms=milliseconds, share=share)
    if report["trace"]:
        log.info("trace written", path=report["trace"], open_in="ui.perfetto.dev")
