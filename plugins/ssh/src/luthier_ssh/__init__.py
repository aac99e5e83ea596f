"""The provider `ssh`: runs on machines of your own. This module describes what is offered."""

from __future__ import annotations

import re

import attrs
from luthier import LuthierError, ProviderRecord, hookimpl, option

HOST = re.compile(r"[A-Za-z0-9_.@:\[\]-]*")


@attrs.frozen(kw_only=True)
class Ssh:
    host: str = option("", help="The machine, in ssh's form: HOST, USER@HOST or a name in ~/.ssh/config.")
    port: int | None = option(None, help="The port; none: from ssh's configuration.", low=1, high=65535)
    identity_file: str | None = option(None, help="The private key; none: from ssh's configuration.")
    config_file: str | None = option(None, help="The configuration of ssh; none: ~/.ssh/config.")
    python: str = option("python3", help="The Python on that machine in which Luthier is installed.")
    folder: str = option("luthier-jobs", help="The folder for jobs on that machine, relative to the home folder.")
    nproc_per_node: str | None = option(None, help="Processes, through torchrun: a number, gpu or cpu; none: one.")

    def __attrs_post_init__(self) -> None:
        if self.host.startswith("-") or not HOST.fullmatch(self.host):
            raise LuthierError(
                "recipe-out-of-range", "this is not the name of a machine", where="Ssh.host", found=self.host
            )


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="ssh",
            summary="Runs on machines of your own over OpenSSH, started once; adapter and model can be downloaded.",
            options=Ssh,
            build="luthier_ssh.place:build_service",
        )
    ]
