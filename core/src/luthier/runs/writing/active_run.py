"""The running run: its state, what callbacks may ask of it, and how a signal ends it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from luthier.runs.writing.phases import Phases
from luthier.runs.writing.run_control import RunControl


class Interrupted(Exception):
    """The end of a run by a signal, after its checkpoint. `exit_status` is 128 plus the signal's number."""

    def __init__(self, number: int, step: int, folder: Path) -> None:
        self.exit_status, self.step, self.folder = 128 + number, step, folder
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; the same command goes on: {folder}"
        )


@attrs.define(kw_only=True, eq=False)
class ActiveRun:
    """A run in progress, as callbacks see it (`RunView`). `settings` is the resolved recipe as plain data."""

    run_id: str
    folder: Path
    name: str
    settings: Mapping[str, Any]
    total_steps: int | None  # None: not known yet, or without end
    # what identifies the run (recipe, data, base, parts), kept in each checkpoint
    belongs: dict[str, Any] = attrs.field(factory=dict)
    is_main: bool = True
    step: int = 0
    control: RunControl = attrs.field(factory=RunControl)
    phases: Phases = attrs.field(factory=Phases)  # callbacks may listen to it, to learn where the time goes

    @property
    def stop_reason(self) -> str | None:
        """Return why the run ends after this step; None if it goes on."""
        return self.control.stop_reason

    @property
    def signal(self) -> int | None:
        """Return the number of the signal that this process was sent, or None."""
        return self.control.signal

    def request_stop(self, reason: str = "requested") -> None:
        """Ask the run to end after this step, with a checkpoint."""
        self.control.stop_reason = reason

    def request_save(self) -> None:
        """Ask for a checkpoint after this step."""
        self.control.wants_save = True

    def request_evaluation(self) -> None:
        """Ask for an evaluation after this step."""
        self.control.wants_evaluation = True
