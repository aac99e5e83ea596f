"""Prompts of answers: a supervised answer must follow the very prompt that generation gets.

This holds also if a template writes another text before an answer than as a prompt, for example without the system
prompt, which it wrote for the last user.
"""

from __future__ import annotations

from typing import Any

from luthier.data.template_calls import Messages
from luthier.data.tokenise.chat_template import ChatTemplate
from luthier.data.tokenise.thoughts import CLOSE, OPEN, split_thought
from luthier.errors import LuthierError

MARK = "vxk3"  # a text that no template contains


def find_answer(messages: Messages, index: int, tools: Any, template: ChatTemplate, length: int) -> str | None:
    """Return what follows the prompt of generation if `messages[index]` answers it; None if that cannot be known.

    The text after the last message is compared: the end of the prompt must begin what the template writes with the
    answer, or begin or end what it writes before the answer (its last `length` characters). A prompt that opens a
    thought gets the answer's thought, or an empty one, and its end.
    """
    ends = _texts_behind(messages, index, tools, template)
    if ends is None:
        return None
    asked, answered = ends
    if answered.startswith(asked):
        return answered[len(asked) :]
    header = answered[: max(len(answered) - length, 0)]
    thought = split_thought(messages[index])[0]
    before, opened, rest = asked.rpartition(OPEN)
    if opened and not rest.strip():
        return _after_opened(answered, before, thought)
    more = asked.startswith(header) and not thought  # generation gets more, such as an empty thought
    return answered[len(header) :] if header.strip() and (more or asked.endswith(header)) else None


def _after_opened(answered: str, before: str, thought: str) -> str | None:
    """Return what follows a prompt that ends with an opened thought, preceded by `before`."""
    if not answered.startswith(before):
        return None
    said = answered[len(before) :].lstrip()
    return said.removeprefix(OPEN).lstrip() if said.startswith(OPEN) else f"{thought}\n{CLOSE}\n\n{said}"


def _texts_behind(messages: Messages, index: int, tools: Any, template: ChatTemplate) -> tuple[str, str] | None:
    """Return what is written after the message before the answer: as a prompt, and with the answer."""
    before = [*messages[: index - 1], {**messages[index - 1], "content": MARK}]
    try:
        asked = template.render(before, tools, prompt=True)
        answered = template.render([*before, messages[index]], tools)
    except LuthierError:
        return None
    if MARK not in asked or MARK not in answered:
        return None
    return asked.rpartition(MARK)[2], answered.rpartition(MARK)[2]
