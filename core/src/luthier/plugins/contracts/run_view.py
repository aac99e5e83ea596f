"""The view of a run that callbacks get: what they may read, and what they may request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class RunView(Protocol):
    """A run in progress, as callbacks see it. A callback reads the attributes, and changes nothing but by requests.

    - `run_id`: the unique id of the run. `name`: the name that people gave it. `folder`: the folder that it writes.
    - `settings`: the resolved recipe as plain data.
    - `step`: the number of optimizer steps that have begun. `total_steps`: their total, None if it is not known.
    - `is_main`: True on the rank that writes the folder.
    - `stop_reason`: the reason for which the run ends after this step, or None.
    - `signal`: the number of the signal that asked the process to end, or None.
    - `phases`: measures the time of the parts of a step, as in `with run.phases("data")`. Each `phases.meter()` has a
      method `take`, which returns the seconds of each phase since it was last called.
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
        """End the run after this step, with a checkpoint. `reason` is recorded as `stop_reason`."""

    def request_save(self) -> None:
        """Ask for a checkpoint after this step."""

    def request_evaluation(self) -> None:
        """Ask for an evaluation after this step."""
