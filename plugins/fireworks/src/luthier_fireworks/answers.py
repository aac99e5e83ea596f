"""Fireworks' answers as the values that every provider returns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from luthier import (
    JobEvent,
    JobMetrics,
    JobProgress,
    JobState,
    JobStatus,
    elapsed_seconds,
    get_logger,
    read_number,
    read_time,
    require_text,
)

from luthier_fireworks.offer import STATES

log = get_logger()
PREFIX: Final = "JOB_STATE_"
RESOLVED: Final = (
    *("epochs", "learningRate", "learningRateWarmupSteps", "batchSize", "batchSizeSamples", "loraRank"),
    *("maxContextLength", "optimizerWeightDecay"),
)
NAMES: Final = {  # name in a line of the metrics file, in lower case -> our name
    "step": "step", "global_step": "step", "epoch": "epoch", "loss": "loss", "train_loss": "loss", "train/loss": "loss",
    "training_loss": "loss", "eval_loss": "eval_loss", "eval/loss": "eval_loss", "validation_loss": "eval_loss",
    "learning_rate": "learning_rate", "lr": "learning_rate", "train/learning_rate": "learning_rate",
    "grad_norm": "grad_norm", "tokens": "tokens",
}  # fmt: skip


def read_job(answer: Mapping[str, Any]) -> JobStatus:
    """Return the status of a job of either kind. Fields that are missing or null are None."""
    raw_state = str(answer.get("state"))
    state, phase = STATES.get(raw_state.removeprefix(PREFIX), (JobState.UNKNOWN, None))
    config = {**answer, **(answer.get("trainingConfig") or {})}
    progress, cost = answer.get("jobProgress") or {}, answer.get("estimatedCost") or {}
    created, finished = read_time(answer.get("createTime")), read_time(answer.get("completedTime"))
    return JobStatus(
        remote_id=require_text(answer, "name"),
        state=state,
        raw_state=raw_state,
        phase=phase,
        reason=_reason(answer.get("status")) if state == JobState.FAILED else None,
        progress=JobProgress(epoch=read_number(progress.get("epoch")), total_epochs=read_number(config.get("epochs"))),
        metrics=JobMetrics(
            duration=elapsed_seconds(created, finished), cost=_money(cost), currency=cost.get("currencyCode")
        ),
        result_model=tuned_model(answer) if state == JobState.COMPLETED else None,
        settings={name: config[name] for name in RESOLVED if config.get(name) is not None},
        created=created,
        finished=finished,
        raw={name: value for name, value in answer.items() if not name.endswith("SignedUrl") and name != "wandbConfig"},
    )


def tuned_model(answer: Mapping[str, Any]) -> str:
    """Return the full name of the model that a job makes: the requested one, or the job's own."""
    name = require_text(answer, "name")
    given = answer.get("outputModel") or (answer.get("trainingConfig") or {}).get("outputModel")
    given = str(given or name.rpartition("/")[2])
    return given if given.startswith("accounts/") else f"accounts/{name.split('/')[1]}/models/{given}"


def state_event(answer: Mapping[str, Any]) -> JobEvent:
    """Return an event with the state and progress of a job, because the service reports no events."""
    progress = answer.get("jobProgress") or {}
    percent, epoch = progress.get("percent"), progress.get("epoch")
    suffix = "" if percent is None else f", {percent} %" + ("" if epoch is None else f" of epoch {epoch}")
    state = str(answer.get("state"))
    at = read_time(answer.get("updateTime")) or read_time(answer.get("createTime")) or 0.0
    return JobEvent(id=f"{state}:{epoch}:{percent}", at=at, kind="state", message=state.removeprefix(PREFIX) + suffix)


def read_metrics(text: str, at: float) -> Iterator[JobEvent]:
    """Yield the lines of a metrics file as events. Lines that are not understood are skipped, with one warning."""
    strange = 0
    for number, line in enumerate(text.splitlines(), 1):
        numbers = _line_numbers(line)
        if numbers.keys() <= {"step", "epoch"}:
            strange += bool(line.strip())
            continue
        step = numbers.get("step")
        kinds = ",".join(sorted(numbers))
        yield JobEvent(id=f"step:{number if step is None else step:g}:{kinds}", at=at, kind="metrics",
                       metrics=numbers)  # fmt: skip
    if strange:
        log.warning("lines of the metrics file are not understood", service="fireworks", lines=strange)


def _line_numbers(line: str) -> dict[str, float | None]:
    try:
        values = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {NAMES[k.lower()]: read_number(v) for k, v in values.items() if k.lower() in NAMES}


def _money(cost: Mapping[str, Any]) -> float | None:
    if not cost:
        return None
    return (read_number(cost.get("units")) or 0.0) + (read_number(cost.get("nanos")) or 0.0) * 1e-9


def _reason(status: Any) -> str:
    """Return what the service says about a failure, which may be only a code."""
    known = status if isinstance(status, dict) else {}
    reason = ": ".join(str(known[name]) for name in ("code", "message") if known.get(name))
    return reason or "the service gives no reason"
