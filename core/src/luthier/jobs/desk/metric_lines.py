"""Lines of a run's metrics as events of its job."""

from __future__ import annotations

import hashlib
import json
from typing import Final

from luthier.plugins.providing.job_records import JobEvent
from luthier.runs.metrics_file import finite_number

NUMBERS: Final = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")


def read_line_event(line: bytes, at: float) -> JobEvent | None:
    """A line as an event; its id is the same wherever in the file it stands, as a resumed run rewrites the file."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    numbers = {name: finite_number(values, name) for name in NUMBERS if name in values}
    if "total_tokens" in values:
        numbers["tokens"] = finite_number(values, "total_tokens")
    return JobEvent(id=hashlib.sha256(line).hexdigest()[:16], at=at, kind="metrics", metrics=numbers)
