"""The run as it happens: its folder, lock and record, and what callbacks may ask of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.engine.disk import write_json
from luthier.engine.health.phases import Phases
from luthier.errors import LuthierError

RECORD: Final = "run.json"
RECIPE: Final = "recipe.yaml"
LIBRARIES: Final = ("luthier", "torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets")


class Interrupted(Exception):
    """A signal ended the run after its checkpoint; `exit_status` is 128 + the signal's number."""

    def __init__(self, number: int, step: int, folder: Path) -> None:
        self.exit_status, self.step, self.folder = 128 + number, step, folder
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; the same command goes on: {folder}"
        )


@attrs.define(kw_only=True, eq=False)
class ActiveRun:
    """A run in progress, as callbacks see it. `settings` is the resolved recipe as plain data."""

    run_id: str
    folder: Path
    name: str
    settings: dict[str, Any]
    total_steps: int | None  # None: not known yet, or without end
    belongs: dict[str, Any] = attrs.field(factory=dict)  # its recipe, data, base and parts, kept in each checkpoint
    is_main: bool = True
    step: int = 0
    stop_reason: str | None = None
    wants_save: bool = False
    wants_evaluation: bool = False
    signal: int | None = None
    phases: Phases = attrs.field(factory=Phases)  # a callback may listen to where the time goes

    def request_stop(self, reason: str = "requested") -> None:
        """End the run after this step, with a checkpoint."""
        self.stop_reason = reason

    def request_save(self) -> None:
        """Write a checkpoint after this step."""
        self.wants_save = True

    def request_evaluation(self) -> None:
        """Evaluate after this step."""
        self.wants_evaluation = True


def new_id() -> str:
    """A run's id: the time, and four characters of chance."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + os.urandom(2).hex()


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json, or None where the folder holds no run."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        remedy = "Restore the file, or choose another folder."
        raise LuthierError(
            "run-not-found", f"{RECORD} is damaged: {error}", where=str(folder), remedy=remedy
        ) from error


def write_record(folder: Path, record: dict[str, Any], **changes: Any) -> None:
    """Bring run.json up to date, on the disk and in memory."""
    record.update(changes, updated=datetime.now(UTC).isoformat(timespec="seconds"))
    write_json(folder / RECORD, strict(record))


def strict(value: Any) -> Any:
    """JSON has no NaN: a loss that is none is null."""
    if isinstance(value, dict):
        return {name: strict(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(device: str) -> dict[str, Any]:
    """What else decides the numbers of a run: versions, processor, threads, and our own variables."""
    import torch

    known = {d: _version(d) for d in LIBRARIES}
    return {
        "versions": {"python": platform.python_version(), **{d: v for d, v in known.items() if v}},
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": device,
        "threads": torch.get_num_threads(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("LUTHIER_", "OMP_", "MKL_"))},
    }


def _version(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None
