"""A conversation with a model: each message is answered after all that was said, of which nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import attrs
import torch

from luthier.errors import LuthierError
from luthier.model.attention import generating_attention
from luthier.model.generation.generate import (
    DEFAULT,
    MESSAGES,
    PromptForm,
    Sampling,
    continue_inputs,
    prompt_ids,
    prompt_messages,
    stop_token_ids,
)
from luthier.model.generation.generation_inputs import cache_name, plain_inputs, prepare_generation
from luthier.model.generation.text_stream import TextStream
from luthier.model.recurrent import separation_reason


@attrs.frozen(kw_only=True)
class Reply:
    """An answer, how it ended, and the tokens of it and of its prompt, of which so many were computed before."""

    text: str
    ended: Literal["stop", "length", "left"]
    tokens: int
    prompt_tokens: int
    kept_tokens: int


@attrs.define(kw_only=True, eq=False)
class Conversation:
    """A conversation with a model, in the form in which the model was trained.

    Without a chat template, or where the model was trained on plain prompts, each message is continued by itself.
    `around` is entered while it answers.
    """

    model: Any
    tokenizer: Any
    adapter: Any = None
    form: PromptForm = MESSAGES
    system: str | None = None
    messages: list[dict[str, Any]] = attrs.field(factory=list)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    saved: dict[Path, bytes] = attrs.field(factory=dict, init=False, repr=False)  # the row that was saved to each file
    _cache: Any = attrs.field(default=None, init=False, repr=False)
    _cached: list[int] = attrs.field(factory=list, init=False, repr=False)  # the tokens that the cache covers

    def __attrs_post_init__(self) -> None:
        self.set_system(self.system)

    @property
    def is_chat(self) -> bool:
        """Return True where messages follow each other; else each is a prompt by itself."""
        return self.form.chat and self.tokenizer.chat_template is not None

    def set_system(self, text: str | None) -> None:
        """Put another system message before what was said; raise `template-missing` where there is no place for one."""
        if text is not None and not self.is_chat:
            problem = "the model is prompted with plain text, which has no place for a system message"
            raise LuthierError("template-missing", problem, found=text, remedy="Write it into the message.")
        self.system = text

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages, self.saved = [], {}

    def rows(self) -> list[dict[str, Any]]:
        """Return what was said as messages, the system's first."""
        return list(prompt_messages(self.messages, self.system))

    def ask(
        self,
        text: str,
        sampling: Sampling = DEFAULT,
        on_text: Callable[[str], None] | None = None,
        leave: Callable[[], bool] | None = None,
    ) -> Reply:
        """Return the answer to a message, which is then part of the conversation, and told to `on_text` as it comes.

        `leave` is asked after each token; where it says True the answer ends there. Where this raises, nothing was
        said.
        """
        if not text:
            raise LuthierError("recipe-missing", "there is no message to answer", where="text", remedy="Give a text.")
        asked: dict[str, Any] = {"role": "user", "content": text}
        messages = [*self.messages, asked] if self.is_chat else [asked]
        ids = prompt_ids(self.tokenizer, prompt_messages(messages, self.system) if self.is_chat else text, self.form)
        stream = TextStream(self.tokenizer, on_text)
        with self.around(), generating_attention(self.model):
            inputs, cached_count = self._inputs(ids)
            sampling = attrs.evolve(sampling, max_new_tokens=self._room(len(ids), sampling.max_new_tokens))
            cache, self._cache = self._cache, None  # an error would leave it half filled
            answer = continue_inputs(self.model, self.tokenizer, inputs, sampling, stops=self.form.stops,
                                     stream=stream, leave=leave)  # fmt: skip
        if cache is not None:
            self._cache, self._cached = cache, [*ids, *answer][: cache.get_seq_length()]
        written = stream.finish_text()
        self.messages = [*messages, {"role": "assistant", "content": written}]
        ended = self._ending(answer, sampling.max_new_tokens)
        return Reply(text=written, ended=ended, tokens=len(answer), prompt_tokens=len(ids), kept_tokens=cached_count)

    def _inputs(self, ids: list[int]) -> tuple[dict[str, Any], int]:
        """Return what generation is given, and how many of the tokens its cache holds already."""
        prompt = torch.tensor([ids], device=self.model.device)
        inputs = prepare_generation(self.model, self.adapter, prompt)
        if not self._keeps(inputs, prompt):
            self._cache = None
            return inputs, 0
        if self._cache is None or len(self._cached) >= len(ids) or ids[: len(self._cached)] != self._cached:
            from transformers import DynamicCache

            self._cache, self._cached = DynamicCache(config=self.model.config.get_text_config()), []
        return {**inputs, cache_name(self.model): self._cache}, len(self._cached)

    def _keeps(self, inputs: dict[str, Any], prompt: torch.Tensor) -> bool:
        """Return True where the model's state after a prompt is keys and values of the prompt's own tokens."""
        if getattr(self.model.generation_config, "cache_implementation", None) is not None:
            return False
        return plain_inputs(inputs, prompt) and separation_reason(self.model.config, self.model) is None

    def _room(self, tokens: int, most: int) -> int:
        """Return how many tokens an answer may have; `recipe-out-of-range` where the prompt has left no place."""
        places = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        added = self.adapter.virtual_tokens() if hasattr(self.adapter, "virtual_tokens") else 0
        if not isinstance(places, int):
            return most
        if tokens + added >= places:
            problem = f"the conversation has {tokens + added:,} tokens, and the model has room for {places:,}"
            raise LuthierError("recipe-out-of-range", problem, where="prompt", remedy="Begin a new conversation.")
        return min(most, places - tokens - added)

    def _ending(self, answer: list[int], most: int) -> Literal["stop", "length", "left"]:
        stops: Iterable[int] = {*stop_token_ids(self.model, self.tokenizer), *self.form.stops}
        if answer and answer[-1] in stops:
            return "stop"
        return "length" if len(answer) >= most else "left"
