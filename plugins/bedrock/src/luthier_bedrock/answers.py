"""Bedrock's answers as the values that every provider returns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any, Final

from luthier import JobEvent, JobMetrics, JobState, JobStatus, elapsed_seconds, read_number, read_time

STATES: Final = {
    "InProgress": (JobState.RUNNING, None),
    "Stopping": (JobState.RUNNING, "canceling"),
    "Completed": (JobState.COMPLETED, None),
    "Failed": (JobState.FAILED, None),
    "Stopped": (JobState.CANCELED, None),
}
PHASES: Final = {  # part of `statusDetails`, the last phase first -> what the job is doing
    "trainingDetails": "training",
    "dataProcessingDetails": "processing the rows",
    "validationDetails": "validating",
}
COLUMNS: Final = {"step_number": "step", "epoch_number": "epoch", "training_loss": "loss",
                  "validation_loss": "eval_loss", "perplexity": "perplexity"}  # fmt: skip


def read_job(answer: Mapping[str, Any]) -> JobStatus:
    """Return the status of a job, from its own description or from an entry of the list."""
    raw_state = str(answer.get("status"))
    state, phase = STATES.get(raw_state, (JobState.UNKNOWN, None))
    details = answer.get("statusDetails") or {}
    if raw_state == "InProgress":
        state, phase = _progress(details)
    created, ended = read_time(answer.get("creationTime")), read_time(answer.get("endTime"))
    done = state == JobState.COMPLETED  # the numbers of an unfinished job are not valid yet
    evaluations = answer.get("validationMetrics") or []
    return JobStatus(
        remote_id=str(answer["jobName"]),
        state=state,
        raw_state=raw_state,
        phase=phase,
        reason=(answer.get("failureMessage") or "the service gives no reason") if state == JobState.FAILED else None,
        metrics=JobMetrics(
            train_loss=read_number((answer.get("trainingMetrics") or {}).get("trainingLoss")) if done else None,
            eval_loss=read_number(evaluations[0].get("validationLoss")) if done and evaluations else None,
            duration=elapsed_seconds(created, ended) if state.is_final else None,
        ),
        result_model=answer.get("outputModelArn") or answer.get("customModelArn") if done else None,
        settings=dict(answer.get("hyperParameters") or {}),
        created=created,
        finished=ended if state.is_final else None,
        raw=dict(answer),
    )


def phase_events(answer: Mapping[str, Any]) -> Iterator[JobEvent]:
    """Yield an event for each phase that has begun or ended, because the service reports no events."""
    details = answer.get("statusDetails") or {}
    for part, phase in reversed(PHASES.items()):
        known = details.get(part) or {}
        status = known.get("status")
        if status not in (None, "NotStarted"):
            at = read_time(known.get("lastModifiedTime")) or read_time(known.get("creationTime")) or 0.0
            yield JobEvent(id=f"{part}:{status}", at=at, kind="state", message=f"{phase}: {status}")


def read_metrics(text: str, name: str, at: float) -> Iterator[JobEvent]:
    """Yield the lines of a metrics file, a CSV with a header, as events."""
    for number, line in enumerate(csv.DictReader(io.StringIO(text)), 1):
        numbers = {COLUMNS[k]: read_number(v) for k, v in line.items() if k in COLUMNS}
        if numbers.keys() - {"step", "epoch"}:
            yield JobEvent(id=f"{name}:{number}", at=at, kind="metrics", metrics=numbers)


def _progress(details: Mapping[str, Any]) -> tuple[JobState, str | None]:
    """Return state and phase of an unfinished job: pending until training begins; running if nothing is said."""
    states = {part: (details.get(part) or {}).get("status") for part in PHASES}
    doing = next((phase for part, phase in PHASES.items() if states[part] not in (None, "NotStarted")), None)
    waits = states["trainingDetails"] == "NotStarted"
    return (JobState.PENDING if waits else JobState.RUNNING), doing
