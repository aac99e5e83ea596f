"""Answers in batches: prompts of about one length are answered together, each as it would be alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from luthier.model.attention import generating_attention
from luthier.model.generation.generate import stop_token_ids
from luthier.model.generation.generation_inputs import complete_inputs, plain_inputs, prepare_generation
from luthier.model.recurrent import separation_reason
from luthier.plugins.contracts.protocols import Adapter
from luthier.randomness import keep_randomness


@attrs.frozen(kw_only=True)
class Question:
    """A prompt's tokens, how many tokens its answer has at most, and the seed that a drawn answer follows from.

    The answer ends before the first of the texts `until`.
    """

    prompt: list[int]
    most: int
    seed: int = 0
    until: tuple[str, ...] = ()


def answer_questions(
    model: Any,
    tokenizer: Any,
    adapter: Adapter,
    questions: Sequence[Question],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    strip: bool = True,
) -> list[str]:
    """Return the answers in the order of the questions: the likeliest tokens, or drawn at a temperature.

    `strip` takes white space at both ends away.

    A batch has at most `max_tokens` tokens, answers included. An answer depends on its own question alone, but for
    the rounding of a padded batch. Where a prompt takes more than its tokens (prompt methods), or where layers carry
    state over padding, each is answered alone.
    """
    if not questions:
        return []
    answers: dict[int, str] = {}
    with generating_attention(model), keep_randomness():
        together = _can_share(model, adapter, questions[0])
        for members in _batches(questions, max_tokens if together else 0):
            asked = [questions[i] for i in members]
            for i, ids in zip(members, _generate(model, tokenizer, adapter, asked, temperature), strict=True):
                text = _cut_text(tokenizer.decode(ids, skip_special_tokens=True), questions[i].until)
                answers[i] = text.strip() if strip else text
    return [answers[i] for i in range(len(questions))]


def _can_share(model: Any, adapter: Adapter, question: Question) -> bool:
    if separation_reason(model.config, model) is not None:
        return False
    prompt = torch.tensor([question.prompt], device=model.device)
    return plain_inputs(prepare_generation(model, adapter, prompt), prompt)


def _batches(questions: Sequence[Question], max_tokens: int) -> Iterator[list[int]]:
    """Questions of about one size, the largest first, so that little is padding."""
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].prompt), -questions[i].most, i))
    batch: list[int] = []
    for i in order:
        grown = [questions[j] for j in (*batch, i)]
        size = len(grown) * (max(len(q.prompt) for q in grown) + max(q.most for q in grown))
        if batch and size > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _generate(
    model: Any, tokenizer: Any, adapter: Adapter, asked: Sequence[Question], temperature: float
) -> list[list[int]]:
    inputs = _inputs(model, tokenizer, adapter, [q.prompt for q in asked])
    stops = stop_token_ids(model, tokenizer)
    known = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    draws = [SeededDraws(temperature, [q.seed for q in asked])] if temperature > 0 else []
    stopping = [TextStops(tokenizer, asked, known)] if any(q.until for q in asked) else []
    whole = model.generate(
        **inputs,
        max_new_tokens=max(q.most for q in asked),
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id or 0,
        logits_processor=LogitsProcessorList(draws),
        stopping_criteria=StoppingCriteriaList(stopping),
    )
    return [_ended(row[: q.most], stops) for row, q in zip(whole[:, known:].tolist(), asked, strict=True)]


def _inputs(model: Any, tokenizer: Any, adapter: Adapter, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Return one prompt's own inputs, or those of several, padded on the left."""
    if len(prompts) == 1:
        return prepare_generation(model, adapter, torch.tensor(prompts, device=model.device))
    longest = max(map(len, prompts))
    padding, spaces = tokenizer.pad_token_id or 0, [longest - len(prompt) for prompt in prompts]
    ids = [[padding] * space + prompt for space, prompt in zip(spaces, prompts, strict=True)]
    mask = [[0] * space + [1] * len(prompt) for space, prompt in zip(spaces, prompts, strict=True)]
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    return complete_inputs(model, {name: tensor.to(model.device) for name, tensor in given.items()})


def _ended(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Return an answer up to its first stop token, as it is where none has come."""
    first = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:first]


def _cut_text(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first of these that stands in it."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


class TextStops(StoppingCriteria):
    """Ends an answer once one of its question's texts stands in it. An answer begins at the token `known`."""

    def __init__(self, tokenizer: Any, asked: Sequence[Question], known: int) -> None:
        self.tokenizer, self.asked, self.known = tokenizer, asked, known

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:  # [B, L] int64 -> [B] bool
        ended = [bool(q.until) and self._stands(row, q) for row, q in zip(input_ids, self.asked, strict=True)]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)

    def _stands(self, row: Tensor, question: Question) -> bool:
        text = self.tokenizer.decode(row[self.known :].tolist(), skip_special_tokens=True)
        return any(stop in text for stop in question.until)


class SeededDraws(LogitsProcessor):
    """Adds Gumbel noise, so that the likeliest token is a draw from the softmax at a temperature.

    Each row draws by a seed of its own, whatever else is in the batch (Maddison et al. 2014, arXiv 1411.0030).
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.randoms = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, L] int64, [B, V] -> [B, V]
        size = scores.shape[-1]
        waits = torch.stack([torch.empty(size).exponential_(generator=random) for random in self.randoms])
        noise = -waits.clamp_min(torch.finfo(waits.dtype).tiny).log()
        return scores.float() / self.temperature + noise.to(scores.device)
