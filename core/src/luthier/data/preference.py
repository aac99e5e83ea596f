"""Preference rows: a chosen and a rejected answer as texts, messages or transcripts, with or without their prompt."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from luthier.data.conversations import read_messages
from luthier.data.documents import as_messages
from luthier.data.rows import broken

if TYPE_CHECKING:
    from luthier.data.examples import PreferenceExample

Messages = list[dict[str, Any]]
SPOKEN: Final = re.compile(r"\n\n(Human|Assistant):")
ROLE: Final = {"Human": "user", "Assistant": "assistant"}


def from_preference(values: dict[str, Any]) -> PreferenceExample:
    """Prompt and answers, all texts or all messages; what both answers begin with goes to the prompt if none is given.

    Transcripts ("\\n\\nHuman: ... \\n\\nAssistant: ...", Anthropic's HH-RLHF) are read as messages.
    """
    from luthier.data.examples import PreferenceExample

    prompt = _side(values.get("prompt"), "prompt") if values.get("prompt") is not None else None
    chosen, rejected = _side(values.get("chosen"), "chosen"), _side(values.get("rejected"), "rejected")
    if isinstance(chosen, list) or isinstance(rejected, list) or isinstance(prompt, list):
        prompt, chosen, rejected = _as_messages(prompt, chosen, rejected)
    elif prompt is None:
        prompt, chosen, rejected = _common_text(chosen, rejected)
    return PreferenceExample(prompt=prompt, chosen=chosen, rejected=rejected)


def _side(value: object, place: str) -> Messages | str:
    """Messages, also under the key messages and as a transcript; or a text."""
    if isinstance(value, dict) and "messages" in value:
        return read_messages(value["messages"], f"{place}.messages")
    if isinstance(value, dict):
        return read_messages([value], place)
    if isinstance(value, list):
        return read_messages(value, place)
    if not isinstance(value, str):
        raise broken(f"{place} is missing" if value is None else f"{place} must be text or messages", value, place)
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
        before = as_messages(prompt, "prompt", "user")
        if before[-1]["role"] == "assistant" and not before[-1]["content"]:
            before = before[:-1]  # a transcript's prompt ends with "Assistant:"
        better, worse = _after(better, before, "chosen"), _after(worse, before, "rejected")
    for place, answer in (("chosen", better), ("rejected", worse)):
        if not answer or answer[-1]["role"] != "assistant":
            raise broken("the last message must be the assistant's", answer[-1:], place)
        if answer[0]["role"] != "assistant":
            raise broken("chosen and rejected do not answer one prompt", answer[0], place)
    return before, better, worse


def _after(answer: Messages, prompt: Messages, place: str) -> Messages:
    """The answer without the prompt that it may repeat."""
    if answer[: len(prompt)] == prompt:
        return answer[len(prompt) :]
    if answer[0]["role"] != "assistant":
        raise broken(f"{place} begins with other messages than the prompt's", answer[0], place)
    return answer


def _shared(better: Messages, worse: Messages) -> int:
    """How many messages both begin with, leaving each at least its last."""
    most = min(len(better), len(worse)) - 1
    return next((i for i in range(most) if better[i] != worse[i]), most)


def _common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """What both texts begin with, up to a space, as the prompt; each answer keeps at least a word."""
    most = min(len(chosen), len(rejected))
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    cut = chosen.rfind(" ", 0, same) if chosen != rejected else -1
    cut = max(cut, 0)
    return chosen[:cut], chosen[cut:], rejected[cut:]
