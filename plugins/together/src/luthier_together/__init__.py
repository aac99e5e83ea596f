"""The provider `together`: fine-tuning jobs at Together AI. This module describes what is offered."""

from __future__ import annotations

import attrs
from luthier import LuthierError, ProviderRecord, check_reference, hookimpl, option

SUFFIX = 29  # characters: Together allows 40, of which 11 name the job


@attrs.frozen(kw_only=True)
class Together:
    api_key: str = option("env:TOGETHER_API_KEY", help="Where the key is: env:NAME, file:PATH or cmd:COMMAND.")
    base_url: str = option("https://api.together.ai", help="The service's address.")
    suffix: str | None = option(None, help="A part of the tuned model's name, at most 29 characters.")
    n_checkpoints: int | None = option(None, help="Number of checkpoints to keep; none: the service decides.", low=1)
    n_evals: int | None = option(
        None, help="Number of evaluations on the validation rows; none: the service decides.", low=0
    )
    wait_for_files: bool = option(True, help="Create the job only after the service has checked the files.")

    def __attrs_post_init__(self) -> None:
        check_reference(self.api_key, "Together.api_key")
        if self.suffix is not None and not 1 <= len(self.suffix) <= SUFFIX:
            problem = f"a suffix must have 1 to {SUFFIX} characters"
            raise LuthierError("recipe-out-of-range", problem, where="Together.suffix", found=self.suffix)


@hookimpl
def luthier_providers() -> list[ProviderRecord]:
    return [
        ProviderRecord(
            name="together",
            summary="Fine-tuning jobs at Together AI: SFT and DPO, LoRA or full, weights to download.",
            options=Together,
            build="luthier_together.service:TogetherService",
        )
    ]
