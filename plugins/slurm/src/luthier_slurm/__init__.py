"""The provider `slurm`: runs in the queue of a Slurm cluster. This module describes what is offered."""

from __future__ import annotations

import re

import attrs
from luthier import LuthierError, ProviderRecord, hookimpl, option

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:@/+-]*")


@attrs.frozen(kw_only=True)
class Slurm:
    folder: str = option("~/luthier-jobs", help="The folder for jobs, on a file system that the nodes share.")
    python: str | None = option(None, help="The Python for the nodes; none: the one that runs here.")
    partition: str | None = option(None, help="The partition; none: the cluster's own choice.")
    account: str | None = option(None, help="The account to charge; none: the user's default.")
    gpus: str | None = option(None, help="The GPUs, such as 1 or a100:2; none: the cluster's default.")
    cpus_per_task: int | None = option(None, help="The processor cores; none: the cluster's default.", low=1)
    memory: str | None = option(None, help="The memory, such as 32G; none: the cluster's default.")
    time_limit: str | None = option(None, help="The time limit, such as 4:00:00; none: the partition's.")
    nproc_per_node: str | None = option(None, help="Processes, through torchrun: a number, gpu or cpu; none: one.")

    def __attrs_post_init__(self) -> None:
        for name in ("partition", "account", "gpus", "memory", "time_limit"):
            value = getattr(self, name)
            if value is not None and not WORD.fullmatch(value):
                raise LuthierError(
                    "recipe-out-of-range", "sbatch does not accept this", where=f"Slurm.{name}", found=value
                )


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="slurm",
            summary="Runs in the queue of a Slurm cluster, by sbatch, squeue and scancel; adapter and model can be "
            "downloaded.",
            options=Slurm,
            build="luthier_slurm.place:build_service",
        )
    ]
