"""Vertex AI's answers as the values that every provider returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from luthier import JobEvent, JobMetrics, JobState, JobStatus, elapsed_seconds, read_number, read_time, require_text

from luthier_vertex.offer import SPECS, STATES

PREFIX: Final = "JOB_STATE_"
PHASE: Final = "TUNING_JOB_STATE_"
COUNTS: Final = ("supervisedTuningDataStats", "preferenceOptimizationDataStats")


def read_job(answer: Mapping[str, Any]) -> JobStatus:
    """Return the status of a job. Fields that are missing or null are None."""
    raw_state = str(answer.get("state"))
    state, phase = STATES.get(raw_state.removeprefix(PREFIX), (JobState.UNKNOWN, None))
    created, ended = read_time(answer.get("createTime")), read_time(answer.get("endTime"))
    return JobStatus(
        remote_id=require_text(answer, "name"),
        state=state,
        raw_state=raw_state,
        phase=phase or _phase(answer),
        reason=_reason(answer.get("error")) if state == JobState.FAILED else None,
        metrics=JobMetrics(tokens=_tokens(answer.get("tuningDataStats")), duration=elapsed_seconds(created, ended)),
        result_model=_model(answer.get("tunedModel") or {}) if state == JobState.COMPLETED else None,
        settings=dict(_spec(answer).get("hyperParameters") or {}),
        created=created,
        finished=ended if state.is_final else None,
        raw=dict(answer),
    )


def job_events(answer: Mapping[str, Any]) -> Iterator[JobEvent]:
    """Yield state and checkpoints as events, because the service reports no events."""
    at = read_time(answer.get("updateTime")) or read_time(answer.get("createTime")) or 0.0
    state, phase = str(answer.get("state")).removeprefix(PREFIX), _phase(answer)
    yield JobEvent(id=f"{state}:{phase}", at=at, kind="state", message=f"{state}: {phase}" if phase else state)
    for item in (answer.get("tunedModel") or {}).get("checkpoints") or []:
        step, epoch = read_number(item.get("step")), read_number(item.get("epoch"))
        name, numbers = f"checkpoint {item.get('checkpointId')}", {"step": step, "epoch": epoch}
        yield JobEvent(id=name, at=at, kind="checkpoint", message=name, metrics=numbers)


def _phase(answer: Mapping[str, Any]) -> str | None:
    raw = str(answer.get("tuningJobState") or "").removeprefix(PHASE)
    return None if raw in ("", "UNSPECIFIED") else raw.replace("_", " ").lower()


def _model(tuned: Mapping[str, Any]) -> str | None:
    """Return the model's name at the service, or the endpoint that serves it."""
    return tuned.get("model") or tuned.get("endpoint")


def _spec(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((answer[name] for name in SPECS.values() if answer.get(name)), {})


def _tokens(stats: Any) -> int | None:
    counts = (stats or {}) if isinstance(stats, dict) else {}
    total = next((counts[name].get("totalBillableTokenCount") for name in COUNTS if counts.get(name)), None)
    number = read_number(total)
    return None if number is None else int(number)


def _reason(error: Any) -> str:
    known = error if isinstance(error, dict) else {}
    return str(known.get("message") or known.get("code") or "the service gives no reason")
