"""The providers `anyscale` and `anyscale-jobs`. This module describes what is offered."""

from __future__ import annotations

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

SUFFIX = 64  # characters
GONE = ("api.endpoints.anyscale.com", "console.endpoints.anyscale.com")  # the public service, ended on 2024-08-01


@attrs.frozen(kw_only=True)
class Anyscale:
    base_url: str | None = option(None, help="The address of your own service, with its /v1 if it has one.")
    api_key: str = option("env:ANYSCALE_API_KEY", help="Where the key is: env:NAME, file:PATH or cmd:COMMAND.")
    suffix: str | None = option(None, help="A part of the tuned model's name, at most 64 characters.")

    def __attrs_post_init__(self) -> None:
        check_reference(self.api_key, "Anyscale.api_key")
        if self.suffix is not None and not 1 <= len(self.suffix) <= SUFFIX:
            problem = f"a suffix must have 1 to {SUFFIX} characters"
            raise LuthierError("recipe-out-of-range", problem, where="Anyscale.suffix", found=self.suffix)
        if any(host in (self.base_url or "") for host in GONE):
            problem = "Anyscale ended its public fine-tuning on 2024-08-01; this address has no service any more"
            remedy = "Give the address of a service of your own, or train with --provider anyscale-jobs."
            raise LuthierError("provider-ended", problem, where="Anyscale.base_url", remedy=remedy)


@attrs.frozen(kw_only=True)
class AnyscaleJobs:
    api_key: str = option("env:ANYSCALE_CLI_TOKEN", help="Where the key is: env:NAME, file:PATH or cmd:COMMAND.")
    address: str = option("https://console.anyscale.com", help="The address of Anyscale's console.")
    cloud: str | None = option(None, help="The cloud, by its name; none: the organization's default.")
    project: str | None = option(None, help="The project, by its name; none: the default of the cloud.")
    compute_config: str | None = option(None, help="The machines, as NAME or NAME:VERSION; none: the cloud's default.")
    image_uri: str | None = option(None, help="The image of the machines; none: Anyscale's default.")
    folder: str = option(
        "/mnt/shared_storage/luthier-jobs", help="The folder for jobs, on storage that stays when a machine ends."
    )
    install: bool = option(
        True, help="Install Luthier and the recipe's plugins for the job; False: the image has them."
    )
    nproc_per_node: str | None = option(None, help="Processes, through torchrun: a number, gpu or cpu; none: one.")
    max_retries: int = option(0, help="How often Anyscale starts a failed job again.", low=0)
    time_limit: int | None = option(None, help="Seconds after which a run is ended; none: no limit.", low=1)

    def __attrs_post_init__(self) -> None:
        check_reference(self.api_key, "AnyscaleJobs.api_key")
        if not self.folder.startswith("/") or ".." in self.folder:
            problem = "this is not an absolute path"
            raise LuthierError("recipe-out-of-range", problem, where="AnyscaleJobs.folder", found=self.folder)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="anyscale",
            summary="Fine-tuning jobs at a service of your own on Anyscale, in OpenAI's wire format: SFT.",
            options=Anyscale,
            build="luthier_anyscale.service:build_service",
        ),
        ProviderRecord(
            name="anyscale-jobs",
            summary="Runs as jobs of Anyscale, through its SDK (extra `jobs`); results stay on the cloud's storage.",
            options=AnyscaleJobs,
            build="luthier_anyscale.job_service:build_service",
        ),
    ]
