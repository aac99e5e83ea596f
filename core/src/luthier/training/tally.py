"""The tally: what a run has done so far, as every checkpoint keeps it."""

from __future__ import annotations

import attrs


@attrs.define(kw_only=True)
class Tally:
    """What a run has done so far; part of every checkpoint."""

    step: int = 0
    epoch: float = 0.0  # how many, with the part of the last one
    tokens: int = 0
    supervised_tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_metric: float | None = None
    evaluation: dict[str, float] = attrs.field(factory=dict)
    owes_evaluation: bool = False  # a signal came before the end of the one after this step
    losses: list[float] = attrs.field(factory=list)
    stop_reason: str | None = None  # so that a run killed after its early stop does not train on
    skipped_steps: int = 0  # whose loss or gradient was not finite
    token_limit: int | None = None  # of a micro-batch, where memory ran out and it was lowered
    batch: int | None = None  # samples of a step as the run began, by which its schedule counts
    held: float = 0.0  # steps of the schedule that moved no weight
