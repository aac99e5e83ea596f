"""One run's folder as it is on disk: whole or cut short, of a run that is running, ended or was killed.

Without torch.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.runs.metric_survey import Survey, survey_metrics
from luthier.runs.metrics_file import finite_number, last_lines, parse_lines
from luthier.runs.writing.record import FORMAT

RECORD: Final = "run.json"
RECIPE: Final = "recipe.yaml"
METRICS: Final = "metrics.jsonl"
LOCK: Final = "lock"
CHECKPOINTS: Final = "checkpoints"


@attrs.frozen(kw_only=True, eq=False, slots=False)
class RunFolder:
    """The contents of a run's folder. `damage` says why `record` is empty; it is None if run.json is whole."""

    path: Path
    record: dict[str, Any]
    damage: str | None = None

    _read: list[Survey] = attrs.field(factory=list, init=False, repr=False)  # the survey, once it is made

    @cached_property
    def state(self) -> str:
        """Return running, stopped, completed or failed; killed if a running run has no process any more; or damaged."""
        if self.damage is not None:
            return "damaged"
        state = str(self.record["state"])
        return "killed" if state == "running" and not is_held(self.path) else state

    @property
    def run_id(self) -> str:
        return str(self.record.get("run_id", ""))

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Return kind, name, distribution and version of each part."""
        parts = self.record.get("parts", [])
        return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []

    @property
    def model(self) -> str | None:
        """Return the base model's name, or the last part of its path."""
        name = reach_value(self.record, "note", "model", "name_or_path")
        return None if name is None else Path(str(name)).name or str(name)

    @property
    def adapter(self) -> str | None:
        return next((str(part.get("name")) for part in self.parts if part.get("kind") == "adapter"), None)

    @property
    def result(self) -> dict[str, Any]:
        """Return what a completed run recorded as its result."""
        result = self.record.get("result")
        return result if isinstance(result, dict) else {}

    @cached_property
    def recent(self) -> list[bytes]:
        """Return the last lines of the metrics as they were written, newest first."""
        return list(reversed(last_lines(self.path / METRICS)))

    @property
    def step(self) -> int:
        """Return the number of optimizer steps that are done, as far as the folder says."""
        known = (finite_number(self.record, "step"), self._newest("step"))
        return max((int(step) for step in known if step is not None), default=0)

    @property
    def total_steps(self) -> int | None:
        number = finite_number(self.record, "total_steps")
        return None if number is None else int(number)

    @property
    def age(self) -> float | None:
        """Return the seconds since the run began; None if the folder does not say."""
        with_zone = str(self.record.get("created", ""))
        try:
            return max(time.time() - datetime.fromisoformat(with_zone).timestamp(), 0.0)
        except (ValueError, OverflowError, OSError):
            return None

    def latest(self, name: str) -> float | None:
        """Return the newest value of a metric, or None."""
        value = self._newest(name)
        return finite_number(self.result, "final_loss" if name == "loss" else name) if value is None else value

    def _newest(self, name: str) -> float | None:
        """Return the newest value of a metric in the last lines. It parses lines only until it meets one."""
        quoted = json.dumps(name).encode()
        values = (finite_number(line, name) for line in parse_lines(line for line in self.recent if quoted in line))
        return next((value for value in values if value is not None), None)

    @property
    def survey(self) -> Survey:
        """Return the ranges of all metrics over the whole run, and the curves of its losses. The file is read once."""
        if not self._read:  # a cached_property has one lock for all folders before Python 3.12
            self._read.append(survey_metrics(self.path / METRICS))
        return self._read[0]

    def settings(self) -> dict[str, Any] | None:
        """Return the resolved recipe as plain data; None if recipe.yaml is missing or damaged."""
        from luthier.errors import LuthierError
        from luthier.recipe.reading.yaml12 import load_yaml

        try:
            tree, _ = load_yaml((self.path / RECIPE).read_text("utf-8"), RECIPE)
        except (OSError, UnicodeDecodeError, LuthierError):
            return None
        # an older luthier wrote the exact list of callbacks under this name
        if isinstance(tree, dict) and "callbacks" in tree:
            tree["exact_callbacks"] = tree.pop("callbacks")
        return tree if isinstance(tree, dict) else None

    def summary(self) -> dict[str, Any]:
        """Return the run's line in the list of runs."""
        return {
            "id": self.run_id,
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "model": self.model,
            "adapter": self.adapter,
            "step": self.step,
            "total_steps": self.total_steps,
            "loss": self.latest("loss"),
            "eval_loss": self.latest("eval_loss"),
            "created": self.record.get("created"),
            "age": self.age,
            "damage": self.damage,
        }


def read_folder(path: Path) -> RunFolder:
    """Return the run of a folder, however damaged. It never raises."""
    try:
        record = json.loads((path / RECORD).read_text("utf-8"))
    except FileNotFoundError:
        return RunFolder(path=path, record={}, damage=f"it has no {RECORD}")
    except (OSError, ValueError, RecursionError) as error:
        return RunFolder(path=path, record={}, damage=f"{RECORD} cannot be read: {error}")
    if not isinstance(record, dict) or not isinstance(record.get("run_id"), str) or "state" not in record:
        return RunFolder(path=path, record={}, damage=f"{RECORD} is no run's record")
    form = record.get("format", FORMAT)  # which older records do not have
    if not isinstance(form, int) or form > FORMAT:
        return RunFolder(path=path, record={}, damage=f"{RECORD} has format {form!r}, and this luthier reads {FORMAT}")
    return RunFolder(path=path, record=record)


def is_held(folder: Path) -> bool:
    """Return True if a process trains in the folder. It holds the lock until it ends, however it ends."""
    from luthier.runs.writing.lock import is_lock_held

    return is_lock_held(folder / LOCK)


def reach_value(values: Any, *names: str) -> Any:
    """Return the value at a path of names; None if there is no such path."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def free_folder(folder: Path) -> Path:
    """Return the folder, or the first free name beside it."""
    counter, candidate = 2, folder
    while candidate.exists():
        candidate, counter = folder.with_name(f"{folder.name}-{counter}"), counter + 1
    return candidate
