"""The provider `fireworks`: fine-tuning jobs at Fireworks AI. This module describes what is offered."""

from __future__ import annotations

import re

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

SUFFIX = re.compile(r"[a-z](?:[a-z0-9-]{0,50}[a-z0-9])?")  # a resource id has 63 characters, and eleven name the job


@attrs.frozen(kw_only=True)
class Fireworks:
    api_key: str = option("env:FIREWORKS_API_KEY", help="Where the key is: env:NAME, file:PATH or cmd:COMMAND.")
    account: str | None = option(None, help="The id of the account; none: FIREWORKS_ACCOUNT_ID.")
    base_url: str = option("https://api.fireworks.ai", help="The service's address.")
    suffix: str | None = option(
        None, help="The beginning of the tuned model's id; characters of the job's id follow it."
    )
    early_stop: bool | None = option(
        None, help="With sft: stop when the loss of the validation rows does not improve; none: the service decides."
    )
    checkpoint_steps: int | None = option(
        None, help="Steps between checkpoints that can be served; none: only the last.", low=1
    )

    def __attrs_post_init__(self) -> None:
        check_reference(self.api_key, "Fireworks.api_key")
        if self.suffix is not None and not SUFFIX.fullmatch(self.suffix):
            problem = (
                "a suffix must be 1 to 52 lower-case letters, digits and hyphens, a letter first and no hyphen last"
            )
            raise LuthierError("recipe-out-of-range", problem, where="Fireworks.suffix", found=self.suffix)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="fireworks",
            summary="Fine-tuning jobs at Fireworks AI: SFT, DPO and ORPO with LoRA, adapters to download.",
            options=Fireworks,
            build="luthier_fireworks.service:FireworksService",
        )
    ]
