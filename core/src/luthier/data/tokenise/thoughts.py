"""Thoughts: what an assistant's message thinks before it answers, in the form that a chat template writes."""

from __future__ import annotations

import re
from typing import Any, Final

Message = dict[str, Any]

KEYS: Final = ("reasoning_content", "reasoning", "thinking")  # keys of messages that templates read a thought from
BLOCK: Final = "content"  # for templates that read none of these keys and write a block in the content unchanged
OPEN, CLOSE = "<think>", "</think>"
BEGINS: Final = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


def split_thought(message: Message) -> tuple[str, Message]:
    """Return a message's thought, and the message without it. The thought is empty if there is none, or several."""
    if OPEN not in message["content"] and not any(key in message for key in KEYS):
        return "", message
    block = BEGINS.fullmatch(message["content"])
    written = {text.strip() for text in (*(message.get(key) for key in KEYS), block and block[1]) if text}
    if len(written - {""}) != 1:
        return "", message
    bare = {key: value for key, value in message.items() if key not in KEYS}
    return (written - {""}).pop(), {**bare, "content": block[2] if block and block[1].strip() else message["content"]}


def give_thought(message: Message, way: str) -> Message:
    """Return the message with its thought where the template reads it: under a key, or in a block before the text."""
    thought, bare = split_thought(message)
    return join_thought(thought, bare, way) if thought else message


def join_thought(thought: str, bare: Message, way: str) -> Message:
    """Return a message without thought, with the thought added."""
    if way == BLOCK:
        return {**bare, "content": f"{OPEN}\n{thought}\n{CLOSE}\n\n{bare['content']}"}
    return {**bare, way or KEYS[0]: thought}
