"""Answers in OpenAI's wire format, turned into the values that every provider returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from luthier.jobs.answer_values import elapsed_seconds, read_number, require_text
from luthier.plugins.providing.job_records import JobEvent, JobMetrics, JobProgress, JobStatus
from luthier.plugins.providing.job_state import JobState

STATES: Final = {  # the service's word -> our state, and the phase
    "validating_files": (JobState.PENDING, "validating"),
    "queued": (JobState.PENDING, "queued"),
    "paused": (JobState.PENDING, "paused"),
    "pending": (JobState.PENDING, None),
    "running": (JobState.RUNNING, "training"),
    "succeeded": (JobState.COMPLETED, None),
    "failed": (JobState.FAILED, None),
    "cancelled": (JobState.CANCELED, None),
}
NAMES: Final = {"train_loss": "loss", "valid_loss": "eval_loss", "full_valid_loss": "full_eval_loss",
                "train_mean_token_accuracy": "accuracy", "total_steps": "total_steps", "step": "step"}  # fmt: skip
LEVELS: Final = {"warn": "warning", "warning": "warning", "error": "error"}


def read_wire_job(answer: Mapping[str, Any]) -> JobStatus:
    """Return a job's status; fields that are missing or null are None. Raises `provider-protocol` without an id."""
    raw_state = str(answer.get("status"))
    state, phase = STATES.get(raw_state, (JobState.UNKNOWN, None))
    created, finished = read_number(answer.get("created_at")), read_number(answer.get("finished_at"))
    tokens, method = answer.get("trained_tokens"), answer.get("method") or {}
    numbers = (method.get(method.get("type") or "") or {}).get("hyperparameters") or answer.get("hyperparameters") or {}
    epochs = numbers.get("n_epochs")
    return JobStatus(
        remote_id=require_text(answer, "id"),
        state=state,
        raw_state=raw_state,
        phase=phase,
        reason=_reason(answer.get("error")),
        progress=JobProgress(tokens=tokens, total_epochs=read_number(epochs)),
        metrics=JobMetrics(tokens=tokens, duration=elapsed_seconds(created, finished)),
        result_model=answer.get("fine_tuned_model"),
        settings={**numbers, **({"seed": answer["seed"]} if answer.get("seed") is not None else {})},
        created=created,
        finished=finished,
        raw=dict(answer),
    )


def read_wire_event(answer: Mapping[str, Any]) -> JobEvent:
    """Return an event. Its numbers may be texts, missing, or null altogether."""
    data: Mapping[str, Any] = answer["data"] if isinstance(answer.get("data"), dict) else {}
    numbers = {NAMES.get(name, name): read_number(value) for name, value in data.items() if name in NAMES}
    return JobEvent(
        id=str(answer.get("id")),
        at=read_number(answer.get("created_at")) or 0.0,
        kind="metrics" if answer.get("type") == "metrics" else "log",
        level=LEVELS.get(str(answer.get("level")), "info"),
        message=str(answer.get("message") or ""),
        metrics=numbers,
    )


def _reason(error: Any) -> str | None:
    """Return what the service says of a failure, and the field that it is about; None for an empty error."""
    if not isinstance(error, dict) or not (error.get("message") or error.get("code")):
        return None
    parts = (error.get("code"), error.get("message"), f"field {error['param']}" if error.get("param") else None)
    return ": ".join(str(part) for part in parts if part)
