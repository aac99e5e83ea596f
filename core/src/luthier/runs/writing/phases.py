"""Phases: how the time of a step is divided. Each part of the loop marks its own time, and meters read it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol, TypeVar

import attrs

from luthier.plugins.contracts.metric_names import SECONDS

NAMES: Final = ("data", "forward", "backward", "optimizer", "evaluation", "saving")
NOTHING: Final = nullcontext()
NONE: Final[Any] = object()
KEPT: Final = 256  # marks that are kept before the older half is added up
T = TypeVar("T")


class Clock(Protocol):
    """A source of time marks. `elapsed` waits until the work before the later mark is done."""

    def mark(self) -> Any: ...

    def elapsed(self, earlier: Any, later: Any) -> float:
        """Return the seconds between two marks."""


class HostClock:
    """A clock of the processor that runs the loop."""

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed(self, earlier: float, later: float) -> float:
        return later - earlier


class CudaClock:
    """A clock of the GPU's stream: kernels count when they run, and data counts while the GPU waits for it."""

    def mark(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, earlier: Any, later: Any) -> float:
        later.synchronize()
        return earlier.elapsed_time(later) / 1000


def choose_clock(device_type: str) -> Clock:
    """Return the clock that measures the work of a device."""
    return CudaClock() if device_type == "cuda" else HostClock()


class Phases:
    """A divider of a step's time. `with phases("forward"):` counts the time inside it, without that of phases within.

    Nothing is counted as long as there is no clock.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self._open: list[str] = []
        self._marks: list[tuple[str, Any, Any]] = []  # phase, mark of its beginning, mark of its end
        self._since: Any = None
        self._totals: dict[str, float] = {}

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        return NOTHING if self._clock is None else _Span(self, name)

    def over(self, name: str, items: Iterable[T]) -> Generator[T, None, None]:
        """Yield the items, and count the wait for each as phase `name`."""
        waiting = iter(items)
        while True:
            with self(name):
                item = next(waiting, NONE)
            if item is NONE:
                return
            yield item

    def listen(self, clock: Clock) -> None:
        """Count from now on. A clock that is there already stays."""
        self._clock = self._clock or clock

    def meter(self) -> PhaseMeter:
        """Return a meter that counts from now on, apart from every other meter."""
        return PhaseMeter(self)

    def settle(self) -> dict[str, float]:
        """Return the seconds of each phase so far. On a GPU it waits for the work that has been started."""
        self._add(len(self._marks))
        return dict(self._totals)

    def _add(self, count: int) -> None:
        """Add the time between the oldest marks to the totals."""
        for name, earlier, later in self._marks[:count]:
            assert self._clock is not None
            self._totals[name] = self._totals.get(name, 0.0) + self._clock.elapsed(earlier, later)
        del self._marks[:count]

    def enter(self, name: str) -> None:
        self._turn()
        self._open.append(name)

    def leave(self) -> None:
        self._turn()
        self._open.pop()

    def _turn(self) -> None:
        """Count the time since the last turn for the innermost phase."""
        assert self._clock is not None
        now = self._clock.mark()
        if self._open:
            self._marks.append((self._open[-1], self._since, now))
            if len(self._marks) == KEPT:
                self._add(KEPT // 2)  # which a GPU has done long ago
        self._since = now


@attrs.define(eq=False)
class PhaseMeter:
    """A meter of the time of each phase."""

    phases: Phases
    _read: dict[str, float] = attrs.field(
        init=False, default=attrs.Factory(lambda own: own.phases.settle(), takes_self=True)
    )

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last `take`; phases that took none are left out."""
        before, self._read = self._read, self.phases.settle()
        spent = {name: seconds - before.get(name, 0.0) for name, seconds in self._read.items()}
        return {name: seconds for name, seconds in spent.items() if seconds}

    def numbers(self) -> dict[str, float]:
        """Return the same under the names of metrics."""
        return {f"{SECONDS}{name}": seconds for name, seconds in self.take().items()}


class _Span:
    """One `with` block of a phase."""

    def __init__(self, phases: Phases, name: str) -> None:
        self.phases, self.name = phases, name

    def __enter__(self) -> None:
        self.phases.enter(self.name)

    def __exit__(self, *_: object) -> None:
        self.phases.leave()
