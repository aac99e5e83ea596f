"""Preference rows (a chosen and a rejected answer) and unpaired rows (an answer and a verdict)."""

from __future__ import annotations

import re
from typing import Any, Final

from luthier.data.formats.beside import Beside
from luthier.data.formats.conversations import read_messages
from luthier.data.formats.documents import as_messages
from luthier.data.formats.forms import Judged, Pair
from luthier.data.formats.message_flags import flags_of_comparison
from luthier.data.read.row import broken_row

Messages = list[dict[str, Any]]
SPOKEN: Final = re.compile(r"\n\n(Human|Assistant):")
ROLE: Final = {"Human": "user", "Assistant": "assistant"}


def from_preference(values: dict[str, Any]) -> Pair:
    """Return prompt and answers, all as texts or all as messages. Without a prompt, what both answers begin with is
    one.

    Transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ...", Anthropic's HH-RLHF) are read as messages.
    """
    prompt = _side(values["prompt"], "prompt") if values.get("prompt") is not None else None
    chosen, rejected = _side(values.get("chosen"), "chosen"), _side(values.get("rejected"), "rejected")
    has_prompt, beside = bool(prompt), Beside.of(values)
    if isinstance(chosen, list) or isinstance(rejected, list) or isinstance(prompt, list) or (beside and has_prompt):
        before, chosen, rejected = _as_messages(prompt, chosen, rejected)
        for name, answer in (("prompt", []), ("chosen", chosen), ("rejected", rejected)):
            flags_of_comparison(_listed(values.get(name)), len(answer), name)
        prompt = beside.before(before)
    elif beside:
        raise broken_row("the row has a system prompt or tools, but its answers have no prompt", values.get("system"))
    elif prompt is None:
        prompt, chosen, rejected = _common_text(chosen, rejected)
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, tools=beside.tools, has_prompt=has_prompt)


def from_unpaired(values: dict[str, Any]) -> Judged:
    """Return one answer with its prompt, a column or the messages before the last.

    The verdict is a column of the loss.
    """
    named = values.get("completion") is None and values.get("messages") is not None
    completion = _side(values.get("messages" if named else "completion"), "messages" if named else "completion")
    prompt = _side(values["prompt"], "prompt") if values.get("prompt") is not None else None
    beside = Beside.of(values)
    if isinstance(prompt, list) or isinstance(completion, list) or (beside and prompt):
        answer = as_messages(completion, "completion", "assistant")
        if prompt is None:
            prompt, answer = answer[:-1], answer[-1:]
        else:
            prompt = _before(prompt)
            answer = _after(answer, prompt, "completion")
        _check_answer(answer, "completion")
        flags_of_comparison(_listed(values.get("prompt")), 0, "prompt")
        flags_of_comparison(_listed(values.get("messages" if named else "completion")), len(answer), "completion")
        return Judged(prompt=beside.before(prompt), completion=answer, tools=beside.tools)
    if beside:
        raise broken_row("the row has a system prompt or tools, but its answer has no prompt", values.get("system"))
    return Judged(prompt=prompt or "", completion=completion)


def _listed(value: object) -> object:
    """Return the list of messages that a side holds, as it was written."""
    messages = value.get("messages", [value]) if isinstance(value, dict) else value
    return messages if isinstance(messages, list) else []


def _side(value: object, place: str) -> Messages | str:
    """Return messages, which may be under the key messages or in a transcript, or a text."""
    if isinstance(value, dict) and "messages" in value:
        return read_messages(value["messages"], f"{place}.messages")
    if isinstance(value, dict):
        return read_messages([value], place)
    if isinstance(value, list):
        return read_messages(value, place)
    if not isinstance(value, str):
        simple = isinstance(value, (bool, int, float))
        remedy = f'As text: template: {{{place}: "{{{place}}}"}} in the source.' if simple else None
        problem = f"{place} is missing" if value is None else f"{place} must be text or messages"
        raise broken_row(problem, value, place, remedy)
    return _transcript(value) if SPOKEN.match(value) else value


def _transcript(text: str) -> Messages:
    parts = SPOKEN.split(text)[1:]
    return [{"role": ROLE[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _as_messages(
    prompt: Messages | str | None, chosen: Messages | str, rejected: Messages | str
) -> tuple[Messages, Messages, Messages]:
    better, worse = as_messages(chosen, "chosen", "assistant"), as_messages(rejected, "rejected", "assistant")
    if prompt is None:
        shared = _shared(better, worse)
        before, better, worse = better[:shared], better[shared:], worse[shared:]
    else:
        before = _before(prompt)
        better, worse = _after(better, before, "chosen"), _after(worse, before, "rejected")
    _check_answer(better, "chosen")
    _check_answer(worse, "rejected")
    return before, better, worse


def _before(prompt: Messages | str) -> Messages:
    """Return the messages of a prompt. The prompt of a transcript ends with "Assistant:"."""
    before = as_messages(prompt, "prompt", "user")
    ended = before[-1]["role"] == "assistant" and not before[-1]["content"]
    return before[:-1] if ended else before


def _check_answer(answer: Messages, place: str) -> None:
    if not answer or answer[-1]["role"] != "assistant":
        raise broken_row("the last message must be the assistant's", answer[-1:], place)
    if answer[0]["role"] != "assistant":
        raise broken_row("the answers do not follow one prompt", answer[0], place)


def _after(answer: Messages, prompt: Messages, place: str) -> Messages:
    """Return the answer without the prompt, which it may repeat."""
    if answer[: len(prompt)] == prompt:
        return answer[len(prompt) :]
    if answer[0]["role"] != "assistant":
        raise broken_row(f"{place} begins with other messages than the prompt's", answer[0], place)
    return answer


def _shared(better: Messages, worse: Messages) -> int:
    """Return how many messages both sides begin with, leaving each at least its last one."""
    most = min(len(better), len(worse)) - 1
    return next((i for i in range(most) if better[i] != worse[i]), most)


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return what both texts begin with, up to a space, as the prompt, and the rest of each, at least a word."""
    most = min(len(chosen), len(rejected))
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    cut = chosen.rfind(" ", 0, same) if chosen != rejected else -1
    cut = max(cut, 0)
    return chosen[:cut], chosen[cut:], rejected[cut:]
