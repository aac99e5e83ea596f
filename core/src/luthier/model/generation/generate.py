"""Generation: one prompt through a model, by its chat template where the tokenizer has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import torch

from luthier.data.tokenise.chat_template import render_prompt
from luthier.data.tokenise.encode import Encoder
from luthier.errors import LuthierError
from luthier.model.attention import generating_attention
from luthier.model.generation.generation_inputs import prepare_generation
from luthier.randomness import keep_randomness


@attrs.frozen(kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen: greedily at temperature 0, else sampled from `seed`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The settings of transformers' generation; `recipe-out-of-range` where one is outside its bounds."""
        _check_range("max_new_tokens", self.max_new_tokens, 1, None)
        _check_range("temperature", self.temperature, 0, None)
        _check_range("top_p", self.top_p, 0, 1)
        drawn = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, **drawn}


DEFAULT: Final = Sampling()


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    adapter: Any = None,
    system: str | None = None,
    chat: bool = True,
    sampling: Sampling = DEFAULT,
) -> str:
    """Return the text that follows `prompt`, a text or messages.

    `adapter` is what is attached to the model: its virtual tokens and prefixes come before the prompt.
    Without `chat`, for a model trained on plain prompts, a text is continued as it stands.
    """
    settings = sampling.arguments()
    if not prompt:
        raise LuthierError("recipe-missing", "there is no prompt to answer", where="prompt", remedy="Give a text.")
    ids = prompt_ids(tokenizer, prompt, system, chat)
    settings["pad_token_id"] = tokenizer.pad_token_id or 0
    with generating_attention(model), keep_randomness():
        torch.manual_seed(sampling.seed)
        stops = stop_token_ids(model, tokenizer) or None
        inputs = prepare_generation(model, adapter, torch.tensor([ids], device=model.device))
        whole = model.generate(**inputs, eos_token_id=stops, **settings)
    known = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0  # what follows embeddings comes by itself
    return tokenizer.decode(whole[0, known:], skip_special_tokens=True)


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: those of the model's generation config, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    known = [own] if isinstance(own, int) else list(own or [])
    return sorted({*known, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def teach_stops(model: Any, tokenizer: Any, learned: Sequence[int]) -> None:
    """Put the stop tokens that training supervises into the generation config, which is saved with the model."""
    stops = sorted({*stop_token_ids(model, tokenizer), *learned})
    if stops:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]


def prompt_ids(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], system: str | None, chat: bool = True
) -> list[int]:
    """The tokens the model continues. Without a chat template, or without `chat`, the prompt is plain text."""
    if not chat and system is None and isinstance(prompt, str):
        return Encoder.of(tokenizer).prompt(prompt)
    if tokenizer.chat_template is None:
        if system is not None or not isinstance(prompt, str):
            raise LuthierError("template-missing", "messages need a chat template", remedy="Give one plain text.")
        return Encoder.of(tokenizer).prompt(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _checked(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return Encoder.of(tokenizer).prompt(render_prompt(tokenizer, messages))


def _checked(prompt: Any) -> list[dict[str, Any]]:
    """Messages, each with its role; a template would pass over what is misspelt."""
    messages = list(prompt) if isinstance(prompt, Sequence) else [prompt]
    for number, message in enumerate(messages):
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            remedy = "Give a text, or a list of {role:, content:}."
            raise LuthierError(
                "recipe-wrong-type", "no message", where=f"prompt[{number}]", found=message, remedy=remedy
            )
    return [dict(message) for message in messages]


def _check_range(name: str, value: float, low: float, high: float | None) -> None:
    if value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"{low} to {high}"
        raise LuthierError("recipe-out-of-range", "outside its bounds", where=name, found=value,
                           remedy=f"Give a number of {span}.")  # fmt: skip
