"""The objects that a caller in Python hands over in the place of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class TaskPlace:
    """Which task of how many a run is; `carried` is the folder of the state that the one before has left."""

    index: int = 0
    total: int = 1
    carried: Path | None = None


@attrs.frozen(kw_only=True)
class Objects:
    """The objects that a caller in Python hands over in the place of names."""

    model: Any = None
    tokenizer: Any = None
    data: Any = None
    eval_data: Any = None
    task: TaskPlace | None = None  # which of several tasks the run is
    prepared: Any = None  # rows that are made already, as a plan has them
