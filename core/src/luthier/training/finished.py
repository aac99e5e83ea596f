"""A finished run, given back as the result that it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier.training.reopen import Given, recorded_result
from luthier.training.run import Run


def finished_run(folder: Path, given: Given | None = None, record: dict[str, Any] | None = None) -> Run:
    """Return the result that a completed run recorded; `given` is what its caller has in hand that no file could hold.

    `record` is what rank 0 has read, where this is another machine.
    """
    return Run(**recorded_result(folder, record), given=given)
