"""The provider `openai`: OpenAI's wire format, at any address. This module describes what is offered."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

SUFFIX = 64  # characters


@attrs.frozen(kw_only=True)
class OpenAI:
    api_key: str = option("env:OPENAI_API_KEY", help="Where the key is: env:NAME, file:PATH or cmd:COMMAND.")
    base_url: str = option("https://api.openai.com/v1", help="The service's address, with its /v1 if it has one.")
    dialect: Literal["auto", "openai", "azure", "compatible"] = option(
        "auto", help="The service's variant of the format; auto: chosen by the address."
    )
    api_version: str | None = option(None, help="Azure's api-version, for its classic addresses.")
    organization: str | None = option(None, help="OpenAI's organization, if the key has several.")
    project: str | None = option(None, help="OpenAI's project, if the key has several.")
    suffix: str | None = option(None, help="A part of the tuned model's name, at most 64 characters.")
    learning_rate_multiplier: float | None = option(
        None, help="Factor of the service's own learning rate, which it does not state.", low=0.0
    )

    def __attrs_post_init__(self) -> None:
        check_reference(self.api_key, "OpenAI.api_key")
        if self.suffix is not None and not 1 <= len(self.suffix) <= SUFFIX:
            problem = f"a suffix must have 1 to {SUFFIX} characters"
            raise LuthierError("recipe-out-of-range", problem, where="OpenAI.suffix", found=self.suffix)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="openai",
            summary="Fine-tuning jobs at OpenAI, Azure and services of the same wire format: SFT and DPO.",
            options=OpenAI,
            build="luthier_openai.service:build_service",
        )
    ]
