"""The provider `skypilot`: managed jobs of a SkyPilot API server. This module describes what is offered."""

from __future__ import annotations

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option


@attrs.frozen(kw_only=True)
class Skypilot:
    address: str = option("http://127.0.0.1:46580", help="The address of the API server.")
    token: str | None = option(None, help="Where the service account's token is: env:NAME, file:PATH or cmd:COMMAND.")
    infra: str | None = option(None, help="Where to run, such as aws/us-east-1 or k8s; none: wherever it is cheapest.")
    accelerators: str | None = option(None, help="GPUs by name and count, such as H100:1; none: no GPU.")
    cpus: str | None = option(None, help="Processor cores, such as 8 or 8+; none: SkyPilot's default.")
    memory: str | None = option(None, help="Memory in GB, such as 64 or 64+; none: SkyPilot's default.")
    use_spot: bool = option(
        False, help="Rent machines that may be taken away; SkyPilot starts the job again elsewhere."
    )
    image: str | None = option(None, help="The machine's image, such as docker:NAME; none: SkyPilot's default.")
    bucket: str | None = option(None, help="A bucket, such as s3://NAME, that is mounted at the folder for jobs.")
    folder: str = option("/luthier", help="The folder for jobs on the machine; results stay in it.")
    install: bool = option(
        True, help="Install Luthier and the recipe's plugins for the job; False: the image has them."
    )
    nproc_per_node: str | None = option(None, help="Processes, through torchrun: a number, gpu or cpu; none: one.")
    time_limit: int | None = option(None, help="Seconds after which the training is stopped; none: no limit.", low=1)

    def __attrs_post_init__(self) -> None:
        if self.token is not None:
            check_reference(self.token, "Skypilot.token")
        if not self.folder.startswith("/") or ".." in self.folder:
            problem = "this is not an absolute path"
            raise LuthierError("recipe-out-of-range", problem, where="Skypilot.folder", found=self.folder)
        if self.bucket is not None and "://" not in self.bucket:
            problem = "a bucket is named with its store, such as s3://NAME or gs://NAME"
            raise LuthierError("recipe-out-of-range", problem, where="Skypilot.bucket", found=self.bucket)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="skypilot",
            summary="Runs as managed jobs of a SkyPilot server, on its cheapest cloud; the price is shown first.",
            options=Skypilot,
            build="luthier_skypilot.service:build_service",
        )
    ]
