"""The provider `openai` and the engine `openai_server`: OpenAI's wire format, at any address. Nothing is sent here."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import EngineRecord, LuthierError, ProviderRecord, check_reference, hookimpl, option

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


@attrs.frozen(kw_only=True)
class OpenAIServer:
    """Options of `openai_server`."""

    base_url: str = option(help="The server's address with its /v1, such as http://127.0.0.1:8000/v1.")
    model: str | None = option(None, help="The model's name at the server; none: the only one that it has.")
    api_key: str | None = option(
        None, help="Where the key is: env:NAME, file:PATH or cmd:COMMAND; none: the server asks for no key."
    )
    prompt: Literal["tokens", "text"] = option(
        "tokens", help="Send prompts as token ids, or as text, for a server that takes no ids."
    )
    stop_token_ids: bool = option(
        True, help="Send the ids of stop tokens, which not every server allows; the model's files name them, too."
    )
    top_p: float | None = option(
        None,
        help="Draw from the likeliest tokens of this probability, where a metric draws answers.",
        low=0.0,
        high=1.0,
    )
    concurrency: int = option(16, help="Requests that are on their way at a time.", low=1, high=100)
    timeout: float = option(600.0, help="Seconds that an answer may take.", low=1.0)

    def __attrs_post_init__(self) -> None:
        if self.api_key is not None:
            check_reference(self.api_key, "OpenAIServer.api_key")


@hookimpl
def luthier_engines() -> list[EngineRecord]:
    return [
        EngineRecord(
            name="openai_server",
            summary="Answers by a server that speaks OpenAI's format: vLLM, SGLang, llama.cpp, transformers serve.",
            options=OpenAIServer,
            build="luthier_openai.completions:CompletionsEngine",
        )
    ]


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
