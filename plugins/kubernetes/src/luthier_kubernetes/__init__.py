"""The provider `kubernetes`: TrainJobs of Kubeflow's trainer. This module describes what is offered."""

from __future__ import annotations

import re
from fractions import Fraction

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

from luthier_kubernetes.quantity import read_quantity

LABEL = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
NAMED = "Write lower-case letters, digits, '-' and '.', as the cluster has it."
SMALLEST = 2**20  # bytes of memory; a smaller value is one whose unit was forgotten


@attrs.frozen(kw_only=True)
class Kubernetes:
    kubeconfig: str | None = option(
        None, help="The file that names the cluster; none: KUBECONFIG, ~/.kube/config, or the pod's own account."
    )
    context: str | None = option(None, help="The context of the file; none: its current one.")
    namespace: str | None = option(None, help="The namespace; none: the context's, or default.")
    server: str | None = option(None, help="The address of the API, instead of a kubeconfig; used with token.")
    token: str | None = option(None, help="Where the token for server is: env:NAME, file:PATH or cmd:COMMAND.")
    certificate_authority: str | None = option(
        None, help="The certificate file of the authority of server; none: the authorities of this machine."
    )
    run_exec: bool = option(False, help="Run the command that the kubeconfig names, to get a token.")
    runtime: str = option("torch-distributed", help="The training runtime, as the cluster's administrator named it.")
    runtime_kind: str = option("ClusterTrainingRuntime", help="Its kind: ClusterTrainingRuntime or TrainingRuntime.")
    image: str | None = option(None, help="The container image; none: the runtime's own.")
    install: bool = option(True, help="Install Luthier and the recipe's plugins in the pod; False: the image has them.")
    claim: str | None = option(
        None, help="A PersistentVolumeClaim to mount at folder; none: the runtime mounts a volume."
    )
    folder: str = option("/luthier", help="Where the volume for results is mounted.")
    work_folder: str = option("/tmp/luthier", help="The folder into which a pod unpacks the recipe and its rows.")
    nodes: int | None = option(None, help="Machines; none: as the runtime says.", low=1)
    nproc_per_node: int | None = option(None, help="Processes on each machine; none: as the runtime says.", low=1)
    gpus: int | None = option(None, help="GPUs of each machine; none: as the runtime says.", low=1)
    cpus: str | int | float | None = option(None, help="Processor cores of each machine, such as 8, 0.5 or 500m.")
    memory: str | int | None = option(None, help="Memory of each machine, with its unit, such as 32Gi.")
    time_limit: int | None = option(None, help="Seconds after which the cluster ends the job; none: no limit.", low=1)

    def __attrs_post_init__(self) -> None:
        for name in ("namespace", "runtime", "claim"):
            value = getattr(self, name)
            if value is not None and not LABEL.fullmatch(value):
                raise _refused("this cannot be a name in Kubernetes", name, value, NAMED)
        _check_quantity("cpus", self.cpus, Fraction(1, 1000), "Write cores: 8, 0.5 or 500m (thousandths).")
        _check_quantity("memory", self.memory, Fraction(SMALLEST), "Write bytes with their unit: 32Gi, 512Mi or 64G.")
        for name in ("folder", "work_folder"):
            path = getattr(self, name)
            if not path.startswith("/") or ":" in path or ".." in path:
                raise _refused("this is not an absolute path", name, path, "Write a path from / without ':' and '..'.")
        if self.runtime_kind not in ("ClusterTrainingRuntime", "TrainingRuntime"):
            raise _refused("it must be ClusterTrainingRuntime or TrainingRuntime", "runtime_kind", self.runtime_kind)
        if self.server is not None and self.kubeconfig is not None:
            problem = "server replaces a kubeconfig"
            raise _refused(problem, "server", self.server, "Give server or kubeconfig, not both.")
        if self.token is not None:
            check_reference(self.token, "Kubernetes.token")
        if self.server is None and (self.token or self.certificate_authority):
            problem, remedy = "token and certificate_authority belong to a server", "Give provider.server too."
            raise _refused(problem, "token" if self.token else "certificate_authority", None, remedy)


def _check_quantity(name: str, value: object, smallest: Fraction, remedy: str) -> None:
    """Raise `recipe-out-of-range` for a value that is no quantity, or too small to be meant."""
    if value is None:
        return
    quantity = read_quantity(str(value))
    if quantity is None:
        raise _refused("this is not a quantity of Kubernetes", name, value, remedy)
    if quantity < smallest:
        raise _refused("this is too little", name, value, remedy)


def _refused(problem: str, name: str, value: object, remedy: str | None = None) -> LuthierError:
    return LuthierError("recipe-out-of-range", problem, where=f"Kubernetes.{name}", found=value, remedy=remedy)


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
