"""TrainJobs of trainer.kubeflow.org/v1alpha1: how they are created, and what their conditions mean."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier import JobProgress, JobSpec, JobState, JobStatus, drop_missing, read_number, read_time, sent_words

from luthier_kubernetes import Kubernetes

VERSION: Final = "trainer.kubeflow.org/v1alpha1"
LABEL: Final = "luthier-job"  # label of a TrainJob with the id of the job
CANCELED: Final = "luthier-canceled"  # annotation of a TrainJob that was cancelled
STEP: Final = "node"  # name of the trainer's replicated job and of its container, in every runtime
GRACE: Final = 600  # seconds that a terminated pod has for its last checkpoint
ENDED: Final = {"Complete": JobState.COMPLETED, "Failed": JobState.FAILED}
PASSED: Final = ("Created", "Suspended")  # conditions that are no end


def name_job(id: str) -> str:
    """Return the name of the TrainJob of a job, which depends on its id alone."""
    return f"luthier-{id}"


def result_folder(options: Kubernetes, name: str) -> str:
    """Return the folder of a job's results on the volume."""
    return f"{options.folder.rstrip('/')}/{name}"


def describe_job(
    job: JobSpec, options: Kubernetes, variables: Mapping[str, str], packages: Sequence[str]
) -> dict[str, Any]:
    """Return the TrainJob: the parcel in its environment, and the command that installs, unpacks and trains."""
    spec = {
        "runtimeRef": {"apiGroup": VERSION.partition("/")[0], "kind": options.runtime_kind, "name": options.runtime},
        "trainer": drop_missing(
            image=options.image,
            command=_command(packages if options.install else (), options.work_folder),
            env=[{"name": name, "value": value} for name, value in variables.items()],
            numNodes=options.nodes,
            numProcPerNode=options.nproc_per_node,
            resourcesPerNode=_resources(options),
        ),
        **drop_missing(activeDeadlineSeconds=options.time_limit, runtimePatches=_patches(options)),
    }
    metadata = {"name": name_job(job.id), "labels": {LABEL: job.id}}
    return {"apiVersion": VERSION, "kind": "TrainJob", "metadata": metadata, "spec": spec}


def _command(packages: Sequence[str], folder: str) -> list[str]:
    train = f"exec python -u {shlex.join(sent_words('run', folder))}"
    if not packages:
        return ["sh", "-c", train]
    return ["sh", "-c", f"python -m pip install --quiet --no-input {shlex.join(packages)} && {train}"]


def _resources(options: Kubernetes) -> dict[str, Any] | None:
    wanted = drop_missing(cpu=options.cpus, memory=options.memory)
    limits = {
        **{name: str(quantity) for name, quantity in wanted.items()},
        **({"nvidia.com/gpu": options.gpus} if options.gpus else {}),
    }
    return {"requests": limits, "limits": limits} if limits else None


def _patches(options: Kubernetes) -> list[dict[str, Any]] | None:
    """Return patches of the runtime: the volume, and time for a last checkpoint."""
    if options.claim is None:
        return None
    pod = {
        "terminationGracePeriodSeconds": GRACE,
        "volumes": [{"name": "luthier", "persistentVolumeClaim": {"claimName": options.claim}}],
        "containers": [{"name": STEP, "volumeMounts": [{"name": "luthier", "mountPath": options.folder}]}],
    }
    replicated = {"name": STEP, "template": {"spec": {"template": {"spec": pod}}}}
    runtime = {"template": {"spec": {"replicatedJobs": [replicated]}}}
    return [{"manager": "luthier/provider", "trainingRuntimeSpec": runtime}]


def read_job(item: Mapping[str, Any], options: Kubernetes) -> JobStatus:
    """Return the status that the conditions of a TrainJob mean."""
    metadata, status = item["metadata"], item.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
    raw, state = _state_of(item, conditions, status.get("jobsStatus") or [])
    ended = conditions.get(raw, {})
    folder = result_folder(options, str(metadata["name"]))
    return JobStatus(
        remote_id=str(metadata["name"]),
        state=state,
        raw_state=raw,
        phase="suspended" if raw == "Suspended" else None,
        reason=f"{ended.get('reason')}: {ended.get('message')}" if state == JobState.FAILED else None,
        progress=_progress_of(status.get("trainerStatus") or {}),
        result_model=folder if state == JobState.COMPLETED else None,
        created=read_time(metadata.get("creationTimestamp")),
        finished=read_time(ended.get("lastTransitionTime")) if state.is_final else None,
    )


def _state_of(
    item: Mapping[str, Any], conditions: Mapping[str, Any], children: Sequence[Mapping[str, Any]]
) -> tuple[str, JobState]:
    """Return the cluster's word for the state, and ours."""
    ended = next((word for word in ENDED if word in conditions), None)
    if ended is not None:
        return ended, ENDED[ended]
    annotations = item["metadata"].get("annotations") or {}
    if CANCELED in annotations and (item.get("spec") or {}).get("suspend"):
        stopping = any(child.get("active") for child in children)
        return ("Stopping", JobState.RUNNING) if stopping else ("Canceled", JobState.CANCELED)
    strange = next((word for word in conditions if word not in PASSED), None)
    if strange is not None:
        return strange, JobState.UNKNOWN
    if "Suspended" in conditions:
        return "Suspended", JobState.PENDING
    ready = any(child.get("ready") for child in children)
    return ("Running", JobState.RUNNING) if ready else ("Created", JobState.PENDING)


def _progress_of(status: Mapping[str, Any]) -> JobProgress:
    """Return the progress in the trainer's own status, if the cluster keeps one."""
    numbers = {m.get("name"): read_number(m.get("value")) for m in status.get("metrics") or []}
    return JobProgress(seconds_left=read_number(status.get("estimatedRemainingSeconds")), loss=numbers.get("loss"))
