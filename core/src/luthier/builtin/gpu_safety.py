"""GPU safety: training pauses while a GPU is too hot or draws too much, and ends where pauses do not help."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import attrs

from luthier.builtin import GpuSafety
from luthier.builtin.gpu_sensors import COMMAND, Reading, Sensor, find_sensor
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.plugins.events import event

log = get_logger()
SLICE: Final = 0.5  # seconds between looks at the requests to a paused run
BLIND: Final = 3  # failed queries before a warning

State = Literal["watching", "paused", "aborted"]


@attrs.define
class Guard:
    """The state machine, without clock or sensor: `see` takes the time in seconds and what was read then."""

    options: GpuSafety
    state: State = "watching"
    pauses: int = 0
    since: float = 0.0  # the time at which the pause began
    reason: str = ""  # the reason for this state

    def see(self, now: float, readings: list[Reading]) -> State:
        """Update the state from readings, and return it. Without readings only the length of a pause counts."""
        if self.state != "aborted":
            self._abort_if_hopeless(now, readings)
        if self.state == "watching":
            self._pause_if_over(now, readings)
        elif self.state == "paused" and readings and self._is_cool(now, readings):
            self.state, self.reason = "watching", f"the hottest GPU is at {hottest(readings):.0f} °C"
        return self.state

    def _abort_if_hopeless(self, now: float, readings: list[Reading]) -> None:
        options, heat = self.options, hottest(readings)
        if heat >= options.abort_temperature:
            self._abort(f"a GPU is at {heat:.0f} °C; the limit is {options.abort_temperature:g}")
        elif self.state == "paused" and now - self.since > options.max_pause_seconds:
            self._abort(f"a pause of {options.max_pause_seconds:g} s has not been enough: {self.reason}")

    def _pause_if_over(self, now: float, readings: list[Reading]) -> None:
        over = self._excess(readings)
        if not over:
            return
        if self.pauses >= self.options.max_pauses:
            self._abort(f"{over} after {self.pauses} pauses")
            return
        self.state, self.reason, self.since, self.pauses = "paused", over, now, self.pauses + 1

    def _excess(self, readings: list[Reading]) -> str:
        """Return what is over its limit, in words; empty where nothing is."""
        options, heat, power = self.options, hottest(readings), hungriest(readings)
        if heat > options.max_temperature:
            return f"a GPU is at {heat:.0f} °C; the limit is {options.max_temperature:g}"
        if options.max_power is not None and power > options.max_power:
            return f"a GPU draws {power:.0f} W; the limit is {options.max_power:g}"
        return ""

    def _is_cool(self, now: float, readings: list[Reading]) -> bool:
        rested = now - self.since >= self.options.pause_seconds
        return rested and hottest(readings) <= self.options.resume_temperature and not self._excess(readings)

    def _abort(self, reason: str) -> None:
        self.state, self.reason = "aborted", reason


def hottest(readings: list[Reading]) -> float:
    """Degrees Celsius; minus infinity where no GPU tells."""
    return max((r.temperature for r in readings if r.temperature is not None), default=-math.inf)


def hungriest(readings: list[Reading]) -> float:
    """Watts; minus infinity where no GPU tells."""
    return max((r.power for r in readings if r.power is not None), default=-math.inf)


class Guardian:
    """Looks every `poll_seconds`, between steps. An abort writes a checkpoint first, and the same command goes on."""

    def __init__(
        self,
        options: GpuSafety,
        *,
        sensor: Sensor | None = None,
        guard: Guard | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.options, self.guard = options, guard or Guard(options)
        self.sensor, self.clock, self.sleep = sensor, clock, sleep
        self.asked = -math.inf  # the time at which the last query began
        self.unanswered = 0

    @event
    def run_started(self, run: Any) -> None:
        self._begin(run)

    @event
    def resumed(self, run: Any) -> None:
        self._begin(run)

    @event
    def step_ended(self, run: Any) -> None:
        if self.guard.state == "aborted":
            self.sleep(SLICE)  # until the checkpoint is written
            return
        readings = self._look()
        if readings is None:
            return
        if self.guard.see(self.clock(), readings) == "paused":
            self._pause(run)
        if self.guard.state == "aborted":
            log.error("gpu safety ends the run after a checkpoint", reason=self.guard.reason, step=run.step)
            run.request_save()

    @event
    def saved(self) -> None:
        if self.guard.state == "aborted":
            raise LuthierError("device-unsafe", self.guard.reason, where="gpu_safety")

    def _begin(self, run: Any) -> None:
        if self.sensor is None:
            self.sensor = find_sensor(watched(run))
        if _number_of("WORLD_SIZE") > _number_of("LOCAL_WORLD_SIZE"):
            log.warning("gpu safety watches the GPUs of the first machine only")

    def _look(self) -> list[Reading] | None:
        """Return what the last query brought, if that is new; a further one is begun where it is time."""
        assert self.sensor is not None
        readings = self.sensor.answer()
        if self.clock() - self.asked >= self.options.poll_seconds:
            self.asked = self.clock()
            self.sensor.ask()
        return None if readings is None else self._answered(readings)

    def _pause(self, run: Any) -> None:
        """Wait until it is cool, or the run is told to end."""
        assert self.sensor is not None
        log.warning("paused", reason=self.guard.reason, step=run.step, pause=self.guard.pauses)
        while self.guard.state == "paused" and run.signal is None and run.stop_reason is None:
            self._rest(run)
            self.sensor.ask()
            self.guard.see(self.clock(), self._answered(self.sensor.answer(wait=True) or []))
        if self.guard.state == "watching":
            log.warning("going on", reason=self.guard.reason, step=run.step)

    def _rest(self, run: Any) -> None:
        """Until the next look, in slices, so that a signal is heard."""
        until = self.clock() + self.options.poll_seconds
        while self.clock() < until and run.signal is None:
            self.sleep(min(SLICE, self.options.poll_seconds))

    def _answered(self, readings: list[Reading]) -> list[Reading]:
        blind = all(r.temperature is None and r.power is None for r in readings)
        self.unanswered = self.unanswered + 1 if blind else 0
        if self.unanswered == BLIND:
            log.warning("gpu safety is blind: the GPU tells neither temperature nor power", command=COMMAND)
        return [] if blind else readings


def watched(run: Any) -> set[str]:
    """Return the ids of the GPUs that the run trains on, on this machine; empty, for all of them, where torch does not
    say.
    """
    import torch

    if not torch.cuda.is_available():
        return set()
    count = _number_of("LOCAL_WORLD_SIZE")
    indices = range(min(count, torch.cuda.device_count())) if count > 1 else [_index(run.settings["device"])]
    uuids = [getattr(torch.cuda.get_device_properties(index), "uuid", None) for index in indices]
    return {f"GPU-{uuid}" for uuid in uuids} if all(uuids) else set()


def _number_of(variable: str) -> int:
    """Return what torchrun says, or 1 where it has not started this process."""
    return int(os.environ.get(variable, "1"))


def _index(device: str) -> int:
    """Return the GPU that a device's name means: `cuda:1` is 1, `cuda` and `auto` the first."""
    return int(device.partition(":")[2] or 0)
