"""The view that callbacks have of a running run: what they may read of it, and what they may ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class RunView(Protocol):
    """A run in progress, as callbacks see it. Callbacks read its attributes and call its requests; they set nothing.

    `run_id` identifies the run for good, `folder` is the folder that it writes to, and `name` is its name for people.
    `settings` is the resolved recipe as plain data. `step` counts the optimizer steps that have begun; `total_steps` is
    None if the end is not known. `is_main` is True on the rank that writes the folder. `stop_reason` is the reason why
    the run will end after this step, or None. `signal` is the number of the signal that asked the process to end, or
    None. `phases` measures the time of the parts of a step (`with run.phases("data")`); see the profiler.
    """

    run_id: str
    folder: Path
    name: str
    settings: Mapping[str, Any]
    step: int
    total_steps: int | None
    is_main: bool
    phases: Any

    @property
    def stop_reason(self) -> str | None: ...

    @property
    def signal(self) -> int | None: ...

    def request_stop(self, reason: str = "requested") -> None:
        """Ask the run to end after this step, with a checkpoint. `reason` is recorded as `stop_reason`."""

    def request_save(self) -> None:
        """Ask for a checkpoint after this step."""

    def request_evaluation(self) -> None:
        """Ask for an evaluation after this step."""
