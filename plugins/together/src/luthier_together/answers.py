"""Together's answers as the values that every provider returns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier import (
    JobEvent,
    JobMetrics,
    JobProgress,
    JobState,
    JobStatus,
    elapsed_seconds,
    read_number,
    read_time,
    require_text,
)

from luthier_together.offer import STATES

ARCHIVE: Final = ".result.tar"
NANO: Final = 1e-9  # prices are in billionths of a dollar
NAMES: Final = {"train/loss": "loss", "train/learning_rate": "learning_rate", "train/global_step": "step",
                "train/epoch": "epoch", "eval/loss": "eval_loss", "train/grad_norm": "grad_norm"}  # fmt: skip
LEVELS: Final = {"warning": "warning", "error": "error", "legacy_iwarning": "warning", "legacy_ierror": "error"}
RESOLVED: Final = (
    *("n_epochs", "batch_size", "learning_rate", "warmup_ratio", "n_checkpoints", "n_evals", "max_seq_length"),
    *("training_type", "training_method", "lr_scheduler", "random_seed"),
)


def read_job(answer: Mapping[str, Any]) -> JobStatus:
    """Return the status of a job. Fields that are missing or null are None."""
    raw_state = str(answer.get("status"))
    state, phase = STATES.get(raw_state, (JobState.UNKNOWN, None))
    events = answer.get("events") or []
    price = answer.get("total_price")
    started, updated = read_time(answer.get("started_at")), read_time(answer.get("updated_at"))
    created = read_time(answer.get("created_at"))
    return JobStatus(
        remote_id=require_text(answer, "id"),
        state=state,
        raw_state=raw_state,
        phase=phase,
        reason=_reason(events) if state == JobState.FAILED else None,
        progress=_progress(answer, events),
        metrics=JobMetrics(
            tokens=answer.get("token_count"),
            cost=None if price is None else price * NANO,
            currency=None if price is None else "USD",
            duration=elapsed_seconds(started, updated),
        ),
        result_model=answer.get("model_output_name") if state == JobState.COMPLETED else None,
        settings={name: answer[name] for name in RESOLVED if answer.get(name) is not None},
        created=created,
        finished=updated if state.is_final else None,
        raw=dict(answer),
    )


def read_event(answer: Mapping[str, Any]) -> JobEvent:
    """Return an event. Its id is a hash of its content, because the service gives none."""
    content = {k: answer.get(k) for k in ("created_at", "type", "message", "step")}
    steps = ("step", "total_steps")
    metrics: dict[str, float | None] = {n: float(answer[n]) for n in steps if isinstance(answer.get(n), int)}
    return JobEvent(
        id=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16],
        at=read_time(answer.get("created_at")) or 0.0,
        kind="checkpoint" if answer.get("type") == "checkpoint_save" else "log",
        level=LEVELS.get(str(answer.get("level")), "info"),
        message=str(answer.get("message") or answer.get("type") or ""),
        metrics=metrics if metrics.get("step") else {},
    )


def read_metrics(lines: Sequence[Mapping[str, Any]]) -> list[JobEvent]:
    """Return the metrics of steps as events."""
    events = []
    for line in lines:
        numbers = {NAMES.get(name, name): read_number(value) for name, value in line.items()}
        at = read_number(line.get("logged_at") or line.get("train/logged_at") or 0.0) or 0.0
        key = ",".join(sorted(numbers))
        step = numbers.get("step")
        events.append(JobEvent(id=f"step:{step}:{hash_text(key)}", at=at, kind="metrics", metrics=numbers))
    return events


def hash_text(text: str) -> str:
    """Return a hash of a text, of eight characters."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _progress(answer: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> JobProgress:
    progress = answer.get("progress") or {}
    steps = [e["step"] for e in events if isinstance(e.get("step"), int)]
    totals = [e["total_steps"] for e in events if isinstance(e.get("total_steps"), int) and e["total_steps"]]
    epochs, total = answer.get("epochs_completed"), answer.get("n_epochs")
    return JobProgress(
        step=max(steps, default=None),
        total_steps=totals[-1] if totals else None,
        epoch=None if epochs is None else float(epochs),
        total_epochs=None if total is None else float(total),
        tokens=answer.get("token_count"),
        seconds_left=float(progress["seconds_remaining"]) if progress.get("estimate_available") else None,
    )


def _reason(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the message of the last event that reports an error."""
    messages = [
        e.get("message") for e in events if e.get("type") == "job_error" or LEVELS.get(str(e.get("level"))) == "error"
    ]
    return str(messages[-1]) if messages else "the service gives no reason"
