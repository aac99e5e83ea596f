"""The engine `openai_server`: answers by `POST /completions` of a server that has the exported model loaded.

vLLM, SGLang, llama.cpp's server and `transformers serve` have this path. Prompts go there as they are, so that no chat
template of the server's takes part.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier import EngineQuestion, LuthierError, ProviderError, Secret, ServiceClient, check_address, read_secret

from luthier_openai import OpenAIServer

FIELDS = "Some servers refuse fields that OpenAI's own service has not: try stop_token_ids: false, or prompt: text."
SEEDS = 2**31  # llama.cpp keeps a seed in 32 bits


class CompletionsEngine:
    """Asks a server for completions, several at a time."""

    def __init__(self, options: OpenAIServer) -> None:
        self.options = options

    async def check(self) -> str:
        """Return the model's name and the server's address, or raise if the server has another model or no answer."""
        client = self._client()
        try:
            return f"{await self._choose_model(client)} at {client.base_url}"
        finally:
            await client.close()

    async def answer(self, questions: Sequence[EngineQuestion], advance: Callable[[int], None]) -> list[str]:
        """Return the answers in order. The first question that cannot be answered ends the others, too."""
        bodies = [self._request(number, question) for number, question in enumerate(questions)]
        client = self._client()
        model = await self._choose_model(client) if bodies else ""

        async def ask(body: dict[str, Any]) -> str:
            text = _read_text(await self._send(client, {"model": model, **body}), client.base_url)
            advance(1)
            return text

        tasks = [asyncio.ensure_future(ask(body)) for body in bodies]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close()

    async def _send(self, client: ServiceClient, body: dict[str, Any]) -> Any:
        try:
            return await client.post_json("/completions", body, repeatable=True)
        except ProviderError as error:
            if error.http_status in (400, 422):
                error.remedy = FIELDS
            raise

    def _request(self, number: int, question: EngineQuestion) -> dict[str, Any]:
        """Return the body of one question's request. The model is named when it is sent."""
        prompt: str | list[int] = list(question.prompt)
        if self.options.prompt == "text":
            if question.text is None:
                problem = "no text gives exactly the tokens of this prompt"
                raise LuthierError("part-unsupported", problem, where=f"OpenAIServer.prompt, row {number}",
                                   found=list(question.prompt[:8]), remedy="Set prompt: tokens.")  # fmt: skip
            prompt = question.text
        body = {
            "prompt": prompt,
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            "seed": question.seed % SEEDS,
        }
        if question.temperature and self.options.top_p is not None:
            body["top_p"] = self.options.top_p
        if self.options.stop_token_ids and question.stop_tokens:
            body["stop_token_ids"] = list(question.stop_tokens)
        return body

    async def _choose_model(self, client: ServiceClient) -> str:
        """Return the model's name at the server: the one that is asked for, or the only one that it has."""
        listed = await client.read_json("/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        names = [str(entry["id"]) for entry in entries or () if isinstance(entry, dict) and "id" in entry]
        asked = self.options.model
        if asked is not None and (asked in names or not names):
            return asked
        if asked is None and len(names) == 1:
            return names[0]
        problem = "the server does not have this model" if asked else f"the server has {len(names)} models"
        remedy = f"Set model to one of: {', '.join(names)}." if names else "Set model, and load it at the server."
        raise LuthierError("part-unknown", problem, where=f"OpenAIServer.model, {client.base_url}", found=asked,
                           remedy=remedy)  # fmt: skip

    def _client(self) -> ServiceClient:
        options = self.options
        address = options.base_url.rstrip("/")
        check_address(address, "OpenAIServer.base_url")
        return ServiceClient(address, service=address, headers=self._headers, together=options.concurrency,
                             rate=1e4, patience=options.timeout)  # fmt: skip

    def _headers(self) -> Mapping[str, str | Secret]:
        if self.options.api_key is None:
            return {}
        return {"authorization": read_secret(self.options.api_key, "OpenAIServer.api_key").with_prefix("Bearer ")}


def _read_text(answer: Any, address: str) -> str:
    """Return the text of an answer's first choice. Raises `provider-protocol` if there is none."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    text = first.get("text") if isinstance(first, dict) else None
    if not isinstance(text, str):
        raise ProviderError("protocol", "the answer has no text", where=f"{address}: POST /completions", found=answer)
    return text
