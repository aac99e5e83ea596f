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
    gpus: float | None = option(None, help="GPUs for the job; none: it asks for none.", low=0.0)
    cpus: float | None = option(None, help="Processor cores for the job; none: it asks for none.", low=0.0)
    nproc_per_node: str | None = option(None, help="Processes, through torchrun: a number, gpu or cpu; none: one.")

    def __attrs_post_init__(self) -> None:
        if self.token is not None:
            check_reference(self.token, "Ray.token")
        if not self.folder.startswith("/") or ".." in self.folder:
            problem = "this is not an absolute path"
            raise LuthierError("recipe-out-of-range", problem, where="Ray.folder", found=self.folder)


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
