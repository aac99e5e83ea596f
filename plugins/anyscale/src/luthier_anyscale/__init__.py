"""The provider `anyscale`: a fine-tuning service that you run on Anyscale. This module describes what is offered."""

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
            remedy = "Give the address of a service of your own, or train with --provider ray on an Anyscale cluster."
            raise LuthierError("provider-ended", problem, where="Anyscale.base_url", remedy=remedy)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="anyscale",
            summary="Fine-tuning jobs at a service of your own on Anyscale, in OpenAI's wire format: SFT.",
            options=Anyscale,
            build="luthier_anyscale.service:build_service",
        )
    ]
