"""Thoughts: what an assistant's message thinks before it answers, in the one way that a chat template writes it."""

from __future__ import annotations

import re
from typing import Any, Final

Message = dict[str, Any]

KEYS: Final = ("reasoning_content", "reasoning", "thinking")  # of messages, as templates read them
BLOCK: Final = "content"  # the way of templates that read none of these, and write a block in the content as it is
OPEN, CLOSE = "<think>", "</think>"
BEGINS: Final = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


def split_thought(message: Message) -> tuple[str, Message]:
    """A message's thought, and the message without it; the thought is empty where it has none, or several."""
    block = BEGINS.fullmatch(message["content"])
    written = {text.strip() for text in (*(message.get(key) for key in KEYS), block and block[1]) if text}
    if len(written - {""}) != 1:
        return "", message
    bare = {key: value for key, value in message.items() if key not in KEYS}
    return (written - {""}).pop(), {**bare, "content": block[2] if block and block[1].strip() else message["content"]}


def give_thought(message: Message, way: str) -> Message:
    """The message with its thought where a template reads it: under a key, or in a block before the content."""
    thought, bare = split_thought(message)
    return join_thought(thought, bare, way) if thought else message


def join_thought(thought: str, bare: Message, way: str) -> Message:
    """A message without thought, given one."""
    if way == BLOCK:
        return {**bare, "content": f"{OPEN}\n{thought}\n{CLOSE}\n\n{bare['content']}"}
    return {**bare, way or KEYS[0]: thought}
