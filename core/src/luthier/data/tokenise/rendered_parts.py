"""What of a row a chat template writes: messages, tools, calls and thoughts whose text changes no text of the row.

A part is lost if another text in its place gives the same texts. Every row is asked, but not every row is rendered
again: which parts a template writes is tried once for each shape of conversation (the roles, which messages are
supervised, what they hold), with a mark in the place of every part. A row is believed where that agrees with its own
texts, that is, where a part that is written stands in them, and one that is not written does not. Where they differ,
as for a text that the template rewrites, the row itself is rendered with marks, and what then is left one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import attrs

from luthier.data.formats.forms import Conversation
from luthier.data.tokenise.thoughts import KEYS, OPEN, split_thought
from luthier.errors import LuthierError

TOOLS: Final = -1  # the place of the tools among the messages
MOST: Final = 4096  # shapes that are remembered
Texts = Sequence[str]
Render = Callable[[Conversation], Texts]


@attrs.frozen
class Part:
    """Something of a row that a template must write, counted as `role`; `text` is what should stand there."""

    role: str
    index: int  # of its message
    text: str
    call: int | None = None
    key: str = ""  # of a thought that is one of several


@attrs.define
class PartFinder:
    """Finds what a template leaves out, with what it has learned of shapes of conversations."""

    known: dict[Any, frozenset[int] | None] = attrs.field(factory=dict)  # the numbers of the parts that are lost

    def find_lost(self, form: Conversation, texts: Texts, render: Render, everything: bool) -> list[Part]:
        """The parts of a conversation that are in none of its texts."""
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
        """The numbers of the parts that are lost in any conversation of this shape; None where marks are refused."""
        shape = _shape(form, everything)
        if shape not in self.known:
            if len(self.known) >= MOST:
                self.known.clear()
            self.known[shape] = _try_shape(form, parts, render)
        return self.known[shape]


def _parts(form: Conversation, everything: bool) -> Iterator[Part]:
    """What must be written of messages; a thought only where it is supervised, for it may be another's past.

    The text of a supervised answer is proven by itself, unless all of the text is supervised.
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
        held = {key: str(message[key]).strip() for key in KEYS if message.get(key)}
        yield from (Part("thought", index, text, key=key) for key, text in held.items() if text)


def last_answer(form: Conversation) -> int:
    """The last supervised message, the last of all where there is none."""
    return max((i for i, on in enumerate(form.trained) if on), default=len(form.messages) - 1)


def _shape(form: Conversation, everything: bool) -> Any:
    """What a template may branch on, besides the texts themselves."""
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
    """The parts that are lost of this very row."""
    marks = {part: f"vxk3{n}z" for n, part in enumerate(parts)}
    try:
        marked = render(_replaced(form, marks))
        parts = [part for part in parts if not any(marks[part] in text for text in marked)]
    except LuthierError:  # one of the marks is refused, so each is tried alone
        pass
    return [part for part in parts if not _changes(form, part, texts, render)]


def _changes(form: Conversation, part: Part, texts: Texts, render: Render) -> bool:
    """Whether another text in the part's place is seen: in the texts, or by the template, which refuses it."""
    try:
        return list(render(_replaced(form, {part: "vxk3y"}))) != list(texts)
    except LuthierError:
        return True


def _replaced(form: Conversation, marks: dict[Part, str]) -> Conversation:
    """The conversation with other texts in the places of parts."""
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
    """A call with other arguments; one without any, of another function."""
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
    """The parts as a sentence names them."""
    return ", ".join("the tools" if part.index == TOOLS else f"{part.role} of messages[{part.index}]" for part in parts)
