"""Places of messages of other roles than the assistant: a probe in a message's place shows where its text begins and
ends.
"""

from __future__ import annotations

from typing import Any

from luthier.data.template_calls import PROBE, Messages
from luthier.data.tokenise.chat_template import ChatTemplate
from luthier.errors import LuthierError


def find_message(messages: Messages, index: int, tools: Any, template: ChatTemplate, whole: str) -> tuple[int, int]:
    """Return where the text of `messages[index]` stands in the whole conversation, with the stop token right after it.

    Another text in its place must change that place alone, and the place must hold the message's own text, except for
    white space at both ends; else this raises `template-unprovable`.
    """
    probed = [*messages[:index], {**messages[index], "content": PROBE}, *messages[index + 1 :]]
    try:
        parts = template.render(probed, tools).split(PROBE)
    except LuthierError:
        parts = []
    if len(parts) != 2 or not (whole.startswith(parts[0]) and whole.endswith(parts[1])):
        raise _unprovable(f"the text of messages[{index}] cannot be found", whole[-200:])
    start, end = len(parts[0]), len(whole) - len(parts[1])
    if whole[start:end].strip() != messages[index]["content"].strip():
        raise _unprovable(f"it changes the text of messages[{index}]", whole[start : start + 200])
    ended = bool(template.closing) and parts[1].startswith(template.closing)
    return start, end + (len(template.closing) if ended else 0)


def _unprovable(problem: str, text: str) -> LuthierError:
    remedy = "Set data.train_on: assistant, or use another template."
    problem = f"the chat template cannot be trained on: {problem}"
    return LuthierError("template-unprovable", problem, found=text, remedy=remedy)
