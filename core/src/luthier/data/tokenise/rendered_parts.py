"""The parts of a row that a chat template leaves out: messages, tools, calls and thoughts that change no text.

A part is lost if another text in its place gives the same result. Every row is checked, but not every row is rendered
again: which parts a template writes is tried once for each shape of conversation (the roles, which messages are
supervised, what they hold), with a mark in the place of every part. A row is trusted if that agrees with its own
texts, that is, if they contain each part that is written and none that is not. If they differ, for example because the
template rewrites a text, the row itself is rendered with marks, and the parts still in doubt one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import attrs

from luthier.data.formats.forms import Conversation
from luthier.data.tokenise.thoughts import KEYS, OPEN, split_thought
from luthier.errors import LuthierError

TOOLS: Final = -1  # the index that stands for the tools
MOST: Final = 4096  # the most shapes that are remembered
Texts = Sequence[str]
Render = Callable[[Conversation], Texts]


@attrs.frozen
class Part:
    """A part that a template must write, counted as `role`. `text` is what the result should contain."""

    role: str
    index: int  # the index of its message
    text: str
    call: int | None = None
    key: str = ""  # the key of a thought, if there are several


@attrs.define
class PartFinder:
    """A finder of what a template leaves out, which remembers the shapes of conversations that it has tried."""

    # the numbers of the parts that are lost, by shape
    known: dict[Any, frozenset[int] | None] = attrs.field(factory=dict)

    def find_lost(self, form: Conversation, texts: Texts, render: Render, everything: bool) -> list[Part]:
        """Return the parts of a conversation that are in none of its texts."""
        parts = list(_parts(form, everything))
        lost = self._lost_of_shape(form, parts, render, everything)
        stands = [_stands(part.text, texts) for part in parts]
        if lost is None:
            return [part for part in parts if not _changes(form, part, texts, render)]
        doubted = [part for n, part in enumerate(parts) if stands[n] == (n in lost)]
        missed = _confirmed(form, doubted, texts, render) if doubted else []
        return [part for n, part in enumerate(parts) if part in missed or (n in lost and not stands[n])]

    def _lost_of_shape(
        self, form: Conversation, parts: list[Part], render: Render, everything: bool
    ) -> frozenset[int] | None:
        """Return the numbers of the parts lost in any conversation of this shape; None if marks are refused."""
        shape = _shape(form, everything)
        if shape not in self.known:
            if len(self.known) >= MOST:
                self.known.clear()
            self.known[shape] = _try_shape(form, parts, render)
        return self.known[shape]


def _parts(form: Conversation, everything: bool) -> Iterator[Part]:
    """Yield what must be written of messages. A thought counts only if it is supervised, as it may be another's past.

    The text of a supervised answer is proven elsewhere, unless all of the text is supervised.
    """
    if form.tools:
        yield Part("tools", TOOLS, str(form.tools[0]["function"].get("name", "")))
    last = last_answer(form)
    for i, message in enumerate(form.messages):
        thought, bare = split_thought(message) if message["role"] == "assistant" else ("", message)
        proven = form.trained[i] and not everything
        if bare["content"].strip() and not proven:
            yield Part(message["role"], i, bare["content"].strip())
        if i == last or (form.trained[i] and not everything):
            yield from _thoughts(message, i, thought)
        for number, call in enumerate(message.get("tool_calls", ())):
            yield Part("tool_calls", i, call["function"]["name"], call=number)


def _thoughts(message: dict[str, Any], index: int, thought: str) -> Iterator[Part]:
    if thought:
        yield Part("thought", index, thought)
    elif message["role"] == "assistant":
        thoughts = {key: str(message[key]).strip() for key in KEYS if message.get(key)}
        yield from (Part("thought", index, text, key=key) for key, text in thoughts.items() if text)


def last_answer(form: Conversation) -> int:
    """Return the index of the last supervised message, or of the last message if there is none."""
    return max((i for i, on in enumerate(form.trained) if on), default=len(form.messages) - 1)


def _shape(form: Conversation, everything: bool) -> Any:
    """Return everything that a template may branch on, except the texts themselves."""
    messages = tuple(map(_shape_of, form.messages))
    return messages, form.trained, bool(form.tools), form.may_be_empty, everything


def _shape_of(message: dict[str, Any]) -> Any:
    content = message["content"]
    calls = tuple((type(c["function"]["arguments"]), bool(c["function"]["arguments"])) for c in
                  message.get("tool_calls", ()))  # fmt: skip
    begins = content[:1] == "<" and content.partition(">")[0]
    return message["role"], bool(content.strip()), begins, OPEN in content, calls, (*message,)


def _try_shape(form: Conversation, parts: list[Part], render: Render) -> frozenset[int] | None:
    marks = {part: f"vxk3{n}z" for n, part in enumerate(parts)}
    marked = _replaced(form, marks)
    try:
        texts = render(marked)
    except LuthierError:
        return None
    missing = [n for n, part in enumerate(parts) if not any(marks[part] in text for text in texts)]
    return frozenset(n for n in missing if not _changes(marked, parts[n], texts, render))


def _stands(text: str, texts: Texts) -> bool:
    if any(text in one for one in texts):
        return True
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    return escaped != text and any(escaped in one for one in texts)


def _confirmed(form: Conversation, parts: list[Part], texts: Texts, render: Render) -> list[Part]:
    """Return the parts that are lost in this very row."""
    marks = {part: f"vxk3{n}z" for n, part in enumerate(parts)}
    try:
        marked = render(_replaced(form, marks))
        parts = [part for part in parts if not any(marks[part] in text for text in marked)]
    except LuthierError:  # the template refuses one of the marks, so each is tried alone
        pass
    return [part for part in parts if not _changes(form, part, texts, render)]


def _changes(form: Conversation, part: Part, texts: Texts, render: Render) -> bool:
    """Return True if another text in the part's place has an effect: on the texts, or as a refusal by the template."""
    try:
        return list(render(_replaced(form, {part: "vxk3y"}))) != list(texts)
    except LuthierError:
        return True


def _replaced(form: Conversation, marks: dict[Part, str]) -> Conversation:
    """Return the conversation with other texts in the places of parts."""
    messages, tools = list(form.messages), form.tools
    for part, mark in marks.items():
        if part.index == TOOLS:
            tools = [_marked_tool(tool, mark) for tool in tools or ()]
        else:
            messages[part.index] = _marked(messages[part.index], part, mark)
    return attrs.evolve(form, messages=tuple(messages), tools=tools)


def _marked(message: dict[str, Any], part: Part, mark: str) -> dict[str, Any]:
    if part.call is not None:
        calls = list(message["tool_calls"])
        calls[part.call] = _marked_call(calls[part.call], mark)
        return {**message, "tool_calls": calls}
    if part.key:
        return {**message, part.key: mark}
    thought, bare = split_thought(message) if message["role"] == "assistant" else ("", message)
    if part.role == "thought":
        return {**bare, KEYS[0]: mark}
    return {**bare, "content": mark, **({KEYS[0]: thought} if thought else {})}


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    """Return a call with other arguments; a call without arguments gets another function."""
    function, other = call["function"], {mark: mark}
    arguments = function["arguments"]
    if arguments in ({}, "", "{}"):
        return {**call, "function": {**function, "name": mark}}
    return {**call, "function": {**function, "arguments": json.dumps(other) if isinstance(arguments, str) else other}}


def _marked_tool(tool: dict[str, Any], mark: str) -> dict[str, Any]:
    texts = {"name": mark, "description": mark}
    schema = {"type": "object", "properties": {mark: {"type": "string", "description": mark}}}
    return {**tool, "function": {**tool["function"], **texts, "parameters": schema}}


def describe_lost(parts: Collection[Part]) -> str:
    """Return the parts as a sentence names them."""
    return ", ".join("the tools" if part.index == TOOLS else f"{part.role} of messages[{part.index}]" for part in parts)
