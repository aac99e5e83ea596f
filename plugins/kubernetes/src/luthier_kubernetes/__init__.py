"""The provider `kubernetes`: TrainJobs of Kubeflow's trainer. This module is light: it only says what is offered."""

from __future__ import annotations

import re

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

LABEL = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([KMGTPE]i?|[mk])?")


@attrs.frozen(kw_only=True)
class Kubernetes:
    kubeconfig: str | None = option(
        None, help="The file that names the cluster; none: KUBECONFIG, ~/.kube/config, or the pod's own account."
    )
    context: str | None = option(None, help="The context of the file; none: its current one.")
    namespace: str | None = option(None, help="The namespace; none: the context's, or default.")
    server: str | None = option(None, help="The API's address, in the place of a kubeconfig; with token.")
    token: str | None = option(None, help="Where the token for server is: env:NAME, file:PATH or cmd:COMMAND.")
    certificate_authority: str | None = option(
        None, help="The file of server's authority; none: those of this machine."
    )
    run_exec: bool = option(False, help="Run the command that the kubeconfig names for a token.")
    runtime: str = option("torch-distributed", help="The training runtime, as the cluster's administrator named it.")
    runtime_kind: str = option("ClusterTrainingRuntime", help="Its kind: ClusterTrainingRuntime or TrainingRuntime.")
    image: str | None = option(None, help="The image that trains; none: the runtime's own.")
    install: bool = option(True, help="Install Luthier and the recipe's plugins in the pod; False: the image has them.")
    claim: str | None = option(
        None, help="A PersistentVolumeClaim to mount at folder; none: the runtime mounts a volume."
    )
    folder: str = option("/luthier", help="Where the volume is mounted, on which results are kept.")
    work_folder: str = option("/tmp/luthier", help="Where a pod unpacks the recipe and its rows.")
    nodes: int | None = option(None, help="Machines; none: as the runtime says.", low=1)
    nproc_per_node: int | None = option(None, help="Processes on each machine; none: as the runtime says.", low=1)
    gpus: int | None = option(None, help="GPUs of each machine; none: as the runtime says.", low=1)
    cpus: str | None = option(None, help="Processor cores of each machine, such as 8 or 500m.")
    memory: str | None = option(None, help="Memory of each machine, such as 32Gi.")
    time_limit: int | None = option(None, help="Seconds after which the job is ended; none: no limit.", low=1)

    def __attrs_post_init__(self) -> None:
        for name, pattern in (
            ("namespace", LABEL),
            ("runtime", LABEL),
            ("claim", LABEL),
            ("cpus", QUANTITY),
            ("memory", QUANTITY),
        ):
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise _refused("this is no such name or quantity of Kubernetes", name, value)
        for name in ("folder", "work_folder"):
            path = getattr(self, name)
            if not path.startswith("/") or ":" in path or ".." in path:
                raise _refused("this is no absolute path", name, path)
        if self.runtime_kind not in ("ClusterTrainingRuntime", "TrainingRuntime"):
            raise _refused("known: ClusterTrainingRuntime, TrainingRuntime", "runtime_kind", self.runtime_kind)
        if self.server is not None and self.kubeconfig is not None:
            raise _refused("server stands in the place of a kubeconfig: give one of them", "server", self.server)
        if self.token is not None:
            check_reference(self.token, "Kubernetes.token")
        if self.server is None and (self.token or self.certificate_authority):
            raise _refused("token and certificate_authority belong to server", "server", None)


def _refused(problem: str, name: str, found: object) -> LuthierError:
    return LuthierError("recipe-out-of-range", problem, where=f"Kubernetes.{name}", found=found)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="kubernetes",
            summary="Runs as Kubeflow TrainJobs of a Kubernetes cluster; results stay on its volume.",
            options=Kubernetes,
            build="luthier_kubernetes.service:build_service",
        )
    ]
