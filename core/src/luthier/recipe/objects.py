"""The objects that a caller passes in Python instead of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class TaskPlace:
    """The place of a run among several tasks. `carried` is the folder with the state that the task before has left.

    `earlier` are the recipes of the tasks before whose rows come again, `replay_share` as many as the run has itself.
    """

    index: int = 0
    total: int = 1
    carried: Path | None = None
    earlier: tuple[Any, ...] = ()
    replay_share: float = 0.0


@attrs.frozen(kw_only=True)
class Objects:
    """The objects that a caller passes in Python instead of names."""

    model: Any = None
    tokenizer: Any = None
    data: Any = None
    eval_data: Any = None
    task: TaskPlace | None = None  # the run's place among several tasks; None for a plain run
    prepared: Any = None  # rows that are prepared already, such as a plan's
