"""The numbers of a job: those that its provider reports, or else those in its events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from luthier.plugins.providing.job_records import Job, JobEvent, JobMetrics, JobProgress

NAMES = {  # a field -> the event metrics that it may be read from
    "step": ("step",),
    "total_steps": ("total_steps",),
    "epoch": ("epoch",),
    "total_epochs": ("total_epochs",),
    "loss": ("loss",),
    "learning_rate": ("learning_rate",),
    "tokens": ("tokens",),
    "seconds_left": ("seconds_left",),
}
WHOLE = ("step", "total_steps", "tokens")


def job_progress(job: Job, events: Sequence[JobEvent]) -> JobProgress:
    """Return the progress of a job; what nobody reports is None."""
    reported = job.status.progress if job.status else JobProgress()
    missing = {name for name in NAMES if getattr(reported, name) is None}
    read = {name: _latest(events, NAMES[name]) for name in missing}
    known = {n: int(v) if n in WHOLE else v for n, v in read.items() if v is not None}
    return attrs.evolve(reported, **known)  # type: ignore[arg-type]


def job_metrics(job: Job, events: Sequence[JobEvent]) -> JobMetrics:
    """Return the losses, tokens, time and cost of a job so far; what nobody reports is None."""
    reported = job.status.metrics if job.status else JobMetrics()
    train, evaluation = _latest(events, ("loss",)), _latest(events, ("eval_loss",))
    tokens = _latest(events, ("tokens",))
    return attrs.evolve(
        reported,
        train_loss=reported.train_loss if reported.train_loss is not None else train,
        eval_loss=reported.eval_loss if reported.eval_loss is not None else evaluation,
        tokens=reported.tokens if reported.tokens is not None else None if tokens is None else int(tokens),
        duration=reported.duration if reported.duration is not None else _duration(job),
    )


def _latest(events: Sequence[JobEvent], names: Iterable[str]) -> float | None:
    """Return the newest number with one of these names, also if the events came out of order."""
    numbers = [
        (e.metrics.get("step") or 0.0, e.at, e.metrics[n])
        for e in events
        for n in names
        if e.metrics.get(n) is not None
    ]
    return max(numbers, key=lambda item: item[:2])[2] if numbers else None


def _duration(job: Job) -> float | None:
    if job.status is None or job.status.created is None or job.status.finished is None:
        return None
    return max(job.status.finished - job.status.created, 0.0)
