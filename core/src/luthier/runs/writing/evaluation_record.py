"""The record of what was measured of a run: evaluations.jsonl, a line for each `luthier evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier.logs import get_logger
from luthier.runs.metrics_file import append_line
from luthier.timestamp import current_time

EVALUATIONS: Final = "evaluations.jsonl"
FORMAT: Final = 1  # of a line: a number that grows where a reader of the last one would go wrong

log = get_logger()


def record_evaluation(run: Path, evaluation: Mapping[str, Any]) -> None:
    """Add an evaluation to those of the run. A folder that cannot be written is a warning: the numbers are shown."""
    try:
        append_line(run / EVALUATIONS, {"format": FORMAT, "timestamp": current_time(), **evaluation})
    except OSError as error:
        log.warning("evaluation_not_recorded", folder=str(run), error=str(error))
