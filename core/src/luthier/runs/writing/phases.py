"""Phases: how the time of a step is divided.

Each part of the loop marks its own, and marks are kept once somebody listens.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol, TypeVar

NAMES: Final = ("data", "forward", "backward", "optimizer", "evaluation", "saving")
NOTHING: Final = nullcontext()
NONE: Final[Any] = object()
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


class Phases:
    """A divider of a step's time. `with phases("forward"):` counts the time inside it, without that of phases within.

    Nothing is counted until `listen` is called.
    """

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self._open: list[str] = []
        self._marks: list[tuple[str, Any, Any]] = []  # phase, mark of its beginning, mark of its end
        self._since: Any = None

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
        """Count from now on, with this clock."""
        self._clock = clock

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last `take`.

        On a GPU it waits for the work that has been started.
        """
        seconds: dict[str, float] = {}
        clock, marks, self._marks = self._clock, self._marks, []
        for name, earlier, later in marks:
            assert clock is not None
            seconds[name] = seconds.get(name, 0.0) + clock.elapsed(earlier, later)
        return seconds

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
        self._since = now


class _Span:
    """One `with` block of a phase."""

    def __init__(self, phases: Phases, name: str) -> None:
        self.phases, self.name = phases, name

    def __enter__(self) -> None:
        self.phases.enter(self.name)

    def __exit__(self, *_: object) -> None:
        self.phases.leave()
