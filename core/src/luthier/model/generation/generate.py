"""Generation: one prompt through a model, by its chat template where the tokenizer has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from luthier.data.tokenise.chat_template import render_prompt
from luthier.data.tokenise.encode import Encoder
from luthier.errors import LuthierError
from luthier.model.attention import generating_attention
from luthier.model.generation.generation_inputs import prepare_generation
from luthier.model.generation.text_stream import TextStream
from luthier.randomness import keep_randomness


@attrs.frozen(kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen: greedily at temperature 0, else sampled from `seed`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Return the settings of transformers' generation; `recipe-out-of-range` where one is outside its bounds."""
        _check_range("max_new_tokens", self.max_new_tokens, 1, None)
        _check_range("temperature", self.temperature, 0, None)
        _check_range("top_p", self.top_p, 0, 1)
        drawn = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, **drawn}


DEFAULT: Final = Sampling()


@attrs.frozen(kw_only=True)
class PromptForm:
    """How a prompt is put to a model: as messages in its chat template, or, without `chat`, as the text stands.

    `variables` are the template's own; `stops` the ids that training has ended answers with.
    """

    chat: bool = True
    variables: Mapping[str, Any] = attrs.field(factory=dict)
    stops: tuple[int, ...] = ()

    @classmethod
    def of_note(cls, note: Mapping[str, Any]) -> PromptForm:
        """Return the form that an artifact was trained with, by its note; a model's without one is a chat."""
        return cls(
            chat=note.get("prompts", "chat") == "chat",
            variables=note.get("chat_template_kwargs") or {},
            stops=tuple(note.get("stop_tokens") or ()),
        )


MESSAGES: Final = PromptForm()


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    adapter: Any = None,
    form: PromptForm = MESSAGES,
    sampling: Sampling = DEFAULT,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Return the text that follows `prompt`, a text or messages.

    `adapter` is what is attached to the model: its virtual tokens and prefixes come before the prompt. `on_text` is
    called with each piece of the text once its tokens are known.
    """
    sampling.arguments()  # refuses values out of range before anything else
    if not prompt:
        raise LuthierError("recipe-missing", "there is no prompt to answer", where="prompt", remedy="Give a text.")
    ids, stream = prompt_ids(tokenizer, prompt, form), TextStream(tokenizer, on_text)
    with generating_attention(model):
        inputs = prepare_generation(model, adapter, torch.tensor([ids], device=model.device))
        continue_inputs(model, tokenizer, inputs, sampling, stops=form.stops, stream=stream)
    return stream.finish_text()


def continue_inputs(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Any],
    sampling: Sampling,
    *,
    stops: Sequence[int] = (),
    stream: TextStream,
    leave: Callable[[], bool] | None = None,
) -> list[int]:
    """Return the tokens that follow prepared inputs, which `stream` is told one by one.

    `leave` is asked after each token; where it says True the answer ends there.
    """
    settings = {**sampling.arguments(), "pad_token_id": tokenizer.pad_token_id or 0, "streamer": stream}
    if leave is not None:
        settings["stopping_criteria"] = StoppingCriteriaList([Leaving(leave)])
    with keep_randomness():
        torch.manual_seed(sampling.seed)
        ends = sorted({*stop_token_ids(model, tokenizer), *stops})
        whole = model.generate(**inputs, eos_token_id=ends or None, **settings)
    # with embeddings, only the new tokens come back
    known = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return whole[0, known:].tolist()


class Leaving(StoppingCriteria):
    """Ends an answer as soon as a function says so."""

    def __init__(self, leave: Callable[[], bool]) -> None:
        self.leave = leave

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:  # [B, L] int64 -> [B] bool
        return torch.full((input_ids.shape[0],), self.leave(), dtype=torch.bool, device=input_ids.device)


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return every token that ends an answer: those of the model's generation config, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    known = [own] if isinstance(own, int) else list(own or [])
    return sorted({*known, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def teach_stops(model: Any, tokenizer: Any, learned: Sequence[int]) -> None:
    """Put the stop tokens that training supervises into the generation config, which is saved with the model."""
    stops = sorted({*stop_token_ids(model, tokenizer), *learned})
    if stops:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], form: PromptForm = MESSAGES) -> list[int]:
    """Return the tokens that the model continues; a text is plain without a chat template, or where no chat is meant.

    Raises `template-missing` for messages where there is no template.
    """
    if isinstance(prompt, str) and (tokenizer.chat_template is None or not form.chat):
        return Encoder.of(tokenizer).prompt(prompt)
    if tokenizer.chat_template is None:
        raise LuthierError("template-missing", "messages need a chat template", remedy="Give one plain text.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _checked(prompt)
    return Encoder.of(tokenizer).prompt(render_prompt(tokenizer, messages, form.variables))


def prompt_messages(prompt: str | Sequence[Mapping[str, Any]], system: str | None) -> Any:
    """Return the prompt as it is, or with a system message before it."""
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _checked(prompt)
    return [{"role": "system", "content": system}, *messages]


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
