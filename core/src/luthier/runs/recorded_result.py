"""The result of a completed run, as its folder records it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError
from luthier.runs.writing.record import read_record

PATHS: Final = ("output_path", "artifact", "merged", "best_checkpoint")


def recorded_result(folder: Path, record: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the fields of `Run` that a completed run recorded; `record` None: read from the folder."""
    record = record or read_record(folder)
    if record is None or "result" not in record:
        raise LuthierError("run-not-found", "no finished run here", where=str(folder))
    fields: dict[str, Any] = {
        name: Path(value) if name in PATHS and value else value for name, value in record["result"].items()
    }
    numbers = (fields["final_loss"], *fields["loss_history"])  # null stands for the loss of a skipped step
    fields["final_loss"], *fields["loss_history"] = (math.nan if loss is None else loss for loss in numbers)
    return fields
