"""Remedies for a row that a chat template does not carry: changes are tried until one works, and the error names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs

from luthier.data.formats.forms import Conversation
from luthier.data.read.columns import advise_columns
from luthier.data.tokenise.chat_template import ChatTemplate
from luthier.data.tokenise.supervised_spans import render_conversation
from luthier.data.tokenise.thoughts import split_thought
from luthier.errors import LuthierError

SWITCHES: Final = ("enable_thinking", "thinking")  # variables by which templates turn thoughts on
BEFORE: Final = ("system", "developer")  # roles whose text may stand before a question as well
OTHERWISE: Final = {
    "data-row": " Or use a template that takes the row.",
    "data-unrendered": " Or use a template that writes it, or set data.unrendered: warn.",
    "template-unprovable": " Or use another template.",
}  # what helps besides, by the code of the error

Messages = tuple[dict[str, Any], ...]
Belong = Callable[[dict[str, Any], dict[str, Any]], bool]  # of a message and the one behind it: are they one?


@attrs.frozen
class Change:
    """A change that may help: the sentence that says it, and the row and template that it gives."""

    sentence: str
    form: Conversation
    template: ChatTemplate


def advise_change(error: LuthierError, form: Conversation, template: ChatTemplate, everything: bool) -> LuthierError:
    """Return the error with the first change that makes the template carry the row as its remedy, if there is one."""
    for change in _changes(form, template) if error.code in OTHERWISE else ():
        if (change.form, change.template) == (form, template):
            continue
        try:
            texts = render_conversation(change.form, change.template, everything)
        except LuthierError:
            continue
        if not any(text.lost for text in texts):
            remedy = f"{change.sentence}{OTHERWISE[error.code]}"
            return LuthierError(error.code, error.problem, where=error.where, found=error.found, remedy=remedy)
    return error


def _changes(form: Conversation, template: ChatTemplate) -> Iterator[Change]:
    """Yield what may help, first what keeps all of the row, then what takes something out."""
    for name in SWITCHES:
        if name in template.text and name not in template.settings:
            sentence = f"Set data.chat_template_kwargs: {{{name}: true}}."
            yield Change(sentence, form, template.with_settings({name: True}))
    for sentence, changed in (*_other_roles(form.messages), *_named_answers(form.messages)):
        yield Change(sentence, form.with_messages(changed), template)
    for sentence, joined in (*_parted_calls(form), _joined_systems(form), _joined_neighbours(form)):
        yield Change(sentence, joined, template)
    if form.tools:
        yield Change(
            f"Leave the tools out: {advise_columns('tools: ignore')}.", attrs.evolve(form, tools=None), template
        )
    bare = tuple(_without_thought(message) for message in form.messages)
    yield Change("Take the thoughts out of the row.", form.with_messages(bare), template)
    first = next((i for i, message in enumerate(form.messages) if message["role"] not in ("assistant", "tool")), 0)
    if first:
        yield Change(
            "Take out the messages before the first question.", _picked(form, range(first, len(bare))), template
        )


def _other_roles(messages: Messages) -> Iterator[tuple[str, Messages]]:
    places = [i for i, message in enumerate(messages) if message["role"] == "developer"]
    if places:
        changed = tuple({**m, "role": "system"} if m["role"] == "developer" else m for m in messages)
        yield f"Give {_listed(places)} the role system.", changed


def _named_answers(messages: Messages) -> Iterator[tuple[str, Messages]]:
    """Yield the messages with the name of its function in each answer of a tool that has none."""
    names: list[str] = []
    changed, places = [], []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        elif message["role"] == "tool" and names:
            name = names.pop(0)
            if not message.get("name"):
                changed.append({**message, "name": name})
                places.append(i)
                continue
        changed.append(message)
    if places:
        yield f"Give {_listed(places)} the name of its function, as `name`.", tuple(changed)


def _parted_calls(form: Conversation) -> Iterator[tuple[str, Conversation]]:
    """Yield the row with one call in each message, with its answer behind it."""
    messages: list[dict[str, Any]] = []
    trained: list[bool] = []
    places: list[int] = []
    parted = 0  # the index behind the last answer that stands behind its own call by now
    for i, (message, on) in enumerate(zip(form.messages, form.trained, strict=True)):
        calls = message.get("tool_calls", ())
        answers = form.messages[i + 1 : i + 1 + len(calls)]
        if len(calls) > 1 and [answer["role"] for answer in answers] == ["tool"] * len(calls):
            places.append(i)
            parted = i + 1 + len(calls)
            said = [message["content"], *[""] * (len(calls) - 1)]
            for call, text, answer in zip(calls, said, answers, strict=True):
                messages += [{**message, "content": text, "tool_calls": [call]}, answer]
                trained += [on, False]
        elif i >= parted:
            messages.append(message)
            trained.append(on)
    if places:
        changed = attrs.evolve(form, messages=tuple(messages), trained=tuple(trained), flags=())
        yield f"Write one call in each message, with its answer behind it: {_listed(places)}.", changed


def _joined_systems(form: Conversation) -> tuple[str, Conversation]:
    """Return the row with each system message before a question joined with it, except one that begins the row."""
    return _joined(form, lambda before, after: before["role"] in BEFORE and after["role"] in (*BEFORE, "user"),
                   "Join the system message with the question behind it: {}.")  # fmt: skip


def _joined_neighbours(form: Conversation) -> tuple[str, Conversation]:
    return _joined(form, lambda before, after: before["role"] == after["role"] != "tool"
                   and not before.get("tool_calls"), "Join neighbours of the same role: {}.")  # fmt: skip


def _joined(form: Conversation, belong: Belong, sentence: str) -> tuple[str, Conversation]:
    """Return the row with messages that belong together as one, which has the role of the last."""
    messages: list[dict[str, Any]] = []
    trained: list[bool] = []
    places: list[int] = []
    for i, (message, on) in enumerate(zip(form.messages, form.trained, strict=True)):
        if messages and belong(messages[-1], message):
            text = f"{messages[-1]['content']}\n\n{message['content']}"
            messages[-1], trained[-1] = {**message, "content": text}, on
            places += [i - 1, i]
        else:
            messages.append(message)
            trained.append(on)
    if not places:
        return sentence, form
    changed = attrs.evolve(form, messages=tuple(messages), trained=tuple(trained), flags=())
    return sentence.format(_listed(sorted(set(places)))), changed


def _without_thought(message: dict[str, Any]) -> dict[str, Any]:
    return split_thought(message)[1] if message["role"] == "assistant" else message


def _picked(form: Conversation, indices: range) -> Conversation:
    messages = tuple(form.messages[i] for i in indices)
    return attrs.evolve(form, messages=messages, trained=tuple(form.trained[i] for i in indices), flags=())


def _listed(places: list[int]) -> str:
    return ", ".join(f"messages[{place}]" for place in places)
