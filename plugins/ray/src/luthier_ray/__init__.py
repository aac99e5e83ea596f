"""The provider `ray`: jobs of a Ray cluster. This module describes what is offered."""

from __future__ import annotations

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option


@attrs.frozen(kw_only=True)
class Ray:
    address: str = option("http://127.0.0.1:8265", help="The cluster's dashboard, which serves its Jobs API.")
    token: str | None = option(None, help="Where the cluster's token is: env:NAME, file:PATH or cmd:COMMAND.")
    folder: str = option(
        "/tmp/luthier-jobs", help="The folder for jobs on the cluster; shared if there are several nodes."
    )
    install: bool = option(
        True, help="Install Luthier and the recipe's plugins for the job; False: the nodes have them."
    )
    gpus: float | None = option(None, help="GPUs for the job, or for each worker; none: it asks for none.", low=0.0)
    cpus: float | None = option(
        None, help="Processor cores for the job, or for each worker; none: it asks for none.", low=0.0
    )
    nproc_per_node: str | None = option(None, help="Processes, through torchrun: a number, gpu or cpu; none: one.")
    workers: int = option(1, help="Workers of Ray Train, on as many nodes as they need; 1: without Ray Train.", low=1)
    min_workers: int | None = option(
        None, help="The fewest workers to go on with when nodes leave; none: as many as workers.", low=1
    )
    max_restarts: int = option(0, help="How often Ray Train starts the workers again after one failed.", low=0)

    def __attrs_post_init__(self) -> None:
        if self.token is not None:
            check_reference(self.token, "Ray.token")
        if not self.folder.startswith("/") or ".." in self.folder:
            problem = "this is not an absolute path"
            raise LuthierError("recipe-out-of-range", problem, where="Ray.folder", found=self.folder)
        if self.workers > 1 and self.nproc_per_node is not None:
            problem = "each worker of Ray Train is one process"
            remedy = "Give as many workers as there are to be processes, and leave nproc_per_node out."
            raise LuthierError("recipe-conflict", problem, where="Ray.nproc_per_node", remedy=remedy)
        if self.workers == 1 and (self.min_workers is not None or self.max_restarts):
            name = "max_restarts" if self.min_workers is None else "min_workers"
            raise LuthierError("recipe-conflict", "nothing reads it: there is one worker", where=f"Ray.{name}",
                               remedy="Give workers, or leave it out.")  # fmt: skip
        if self.min_workers is not None and self.min_workers > self.workers:
            problem = f"there are at most {self.workers} workers"
            raise LuthierError("recipe-out-of-range", problem, where="Ray.min_workers", found=self.min_workers)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="ray",
            summary="Runs as jobs of a Ray cluster, through its Jobs API; adapter and model can be downloaded.",
            options=Ray,
            build="luthier_ray.service:build_service",
        )
    ]
