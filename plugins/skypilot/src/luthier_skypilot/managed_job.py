"""Managed jobs of SkyPilot: how one is described, and what its record means."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier import CostEstimate, JobState, JobStatus, drop_missing, require_text, sent_words

from luthier_skypilot import Skypilot

NAMED: Final = "luthier-"  # begins the name of each of our jobs
STATES: Final = {
    "PENDING": JobState.PENDING, "SUBMITTED": JobState.PENDING, "STARTING": JobState.PENDING,
    "RUNNING": JobState.RUNNING, "RECOVERING": JobState.RUNNING, "WINDING_DOWN": JobState.RUNNING,
    "CANCELLING": JobState.RUNNING, "SUCCEEDED": JobState.COMPLETED, "CANCELLED": JobState.CANCELED,
    "FAILED": JobState.FAILED, "FAILED_SETUP": JobState.FAILED, "FAILED_PRECHECKS": JobState.FAILED,
    "FAILED_NO_RESOURCE": JobState.FAILED, "FAILED_CONTROLLER": JobState.FAILED,
}  # fmt: skip
PHASES: Final = ("STARTING", "RECOVERING", "WINDING_DOWN", "CANCELLING")
CHOSEN: Final = re.compile(r"(\d+\.\d+)\s+✔")  # the last columns of the plan's table: COST ($), CHOSEN
HOURLY: Final = re.compile(r"Estimated cost:\D*?\$(\d+\.\d+) / hour")
COLORS: Final = re.compile(r"\x1b\[[0-9;]*m")


def name_job(id: str) -> str:
    """Return the name of a job, which depends on its id alone."""
    return f"{NAMED}{id}"


def result_folder(options: Skypilot, name: str) -> str:
    """Return the folder of a job's results on its machine."""
    return f"{options.folder.rstrip('/')}/{name}"


def describe_task(name: str, options: Skypilot, variables: Mapping[str, str], packages: Sequence[str]) -> str:
    """Return the documents of the task, in YAML: the job's name, then its machine, its variables and its commands."""
    resources = drop_missing(
        infra=options.infra,
        accelerators=options.accelerators,
        cpus=options.cpus,
        memory=options.memory,
        image_id=options.image,
    )
    mounts = {options.folder: {"source": options.bucket, "mode": "MOUNT"}} if options.bucket else None
    install = f"python -m pip install --quiet --no-input {shlex.join(packages)}" if options.install else None
    task = {
        "name": name,
        "resources": {**resources, **({"use_spot": True} if options.use_spot else {})},
        **({"envs": dict(variables)} if variables else {}),
        **drop_missing(file_mounts=mounts, setup=install),
        "run": _run_command(result_folder(options, name), options.time_limit),
    }
    return "\n---\n".join(json.dumps(document) for document in ({"name": name}, task))


def _run_command(folder: str, limit: int | None) -> str:
    words = ["python", "-u", *sent_words("run", folder)]
    limited = [] if limit is None else ["timeout", "--signal=TERM", "--kill-after=600", str(limit)]
    return shlex.join([*limited, *words])


def read_record(item: Mapping[str, Any], options: Skypilot) -> JobStatus:
    """Return the status that a record of the queue means."""
    raw = require_text(item, "status")
    state = STATES.get(raw, JobState.UNKNOWN)
    name = str(item.get("job_name") or item.get("task_name"))
    return JobStatus(
        remote_id=require_text(item, "job_id"),
        state=state,
        raw_state=raw,
        phase=raw.lower() if raw in PHASES else None,
        reason=str(item.get("failure_reason") or raw) if state == JobState.FAILED else None,
        result_model=result_folder(options, name) if state == JobState.COMPLETED else None,
        created=item.get("submitted_at"),
        finished=item.get("end_at") if state.is_final else None,
    )


def read_plan(text: str, options: Skypilot) -> CostEstimate:
    """Return the cost that the optimizer's plan states. It knows a price for an hour, and no duration."""
    plain = COLORS.sub("", text)
    found = CHOSEN.search(plain) or HOURLY.search(plain)
    if found is None:
        return CostEstimate(amount=None, basis="SkyPilot's plan states no price")
    hourly = float(found[1])
    basis = f"{hourly:g} USD an hour, by SkyPilot's catalogue"
    if options.time_limit is None:
        return CostEstimate(amount=None, basis=f"{basis}; provider.time_limit gives a most")
    return CostEstimate(amount=round(hourly * options.time_limit / 3600, 4),
                        basis=f"at most {options.time_limit} seconds of training at {basis}")  # fmt: skip
