"""The provider `ssh`: runs on machines of your own. This module describes what is offered."""

from __future__ import annotations

import re

import attrs
from luthier import LuthierError, ProviderRecord, hookimpl, option

HOST = re.compile(r"[A-Za-z0-9_.@:\[\]-]*")


@attrs.frozen(kw_only=True)
class Ssh:
    host: str = option("", help="The machine, as ssh takes it: HOST, USER@HOST or a name of ~/.ssh/config.")
    port: int | None = option(None, help="The port; none: as ssh's configuration says.", low=1, high=65535)
    identity_file: str | None = option(None, help="The private key; none: as ssh's configuration says.")
    config_file: str | None = option(None, help="Another configuration than ~/.ssh/config.")
    python: str = option("python3", help="The Python over there that Luthier is installed for.")
    folder: str = option("luthier-jobs", help="Where jobs lie over there; relative to the home folder.")
    nproc_per_node: str | None = option(None, help="Processes, through torchrun: a number, gpu or cpu; none: one.")

    def __attrs_post_init__(self) -> None:
        if self.host.startswith("-") or not HOST.fullmatch(self.host):
            raise LuthierError("recipe-out-of-range", "this is no name of a machine", where="Ssh.host", found=self.host)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="ssh",
            summary="Runs on machines of your own over OpenSSH, started once; adapter and model come back.",
            options=Ssh,
            build="luthier_ssh.place:build_service",
        )
    ]
