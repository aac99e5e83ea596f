"""Conversations as text with the supervised spans of any chat template, found by offsets and proven."""

from __future__ import annotations

import json
import os
from typing import Any, Final

import attrs

from luthier.data.formats.forms import Conversation
from luthier.data.template_calls import PROBE
from luthier.data.tokenise.chat_template import ChatTemplate
from luthier.data.tokenise.refusals.culprits import name_culprit
from luthier.data.tokenise.rendered_parts import Part, last_answer
from luthier.data.tokenise.spans.answer_prompts import find_answer
from luthier.data.tokenise.spans.message_spans import find_message
from luthier.data.tokenise.thoughts import CLOSE, OPEN, give_thought, split_thought
from luthier.errors import LuthierError

Span = tuple[int, int]  # characters [start, end)
LONG: Final = 256  # messages of a conversation whose shape is not learned, because few others have it


@attrs.frozen(kw_only=True)
class Rendered:
    """A text to tokenise and its supervised spans. `everything` means that all of it is supervised."""

    text: str
    spans: tuple[Span, ...]
    everything: bool = False
    eos: bool = False  # True if the EOS token follows the text and is supervised
    where: str = ""
    remarks: tuple[str, ...] = ()  # what the template did with the text, to be counted
    lost: tuple[Part, ...] = ()  # parts of the row that none of its texts contains
    weight: float = 1.0  # the weight of its supervised tokens in the loss


@attrs.frozen(kw_only=True)
class Turn:
    """One answer: the text up to its end, its spans there, and where a stop token must be inserted, or None.

    Of a message of another role, the text is the whole conversation.
    """

    text: str
    spans: tuple[Span, ...]
    insert: int | None
    foreign: bool = False  # True if the text before it is not the prompt that generation gets
    answers: bool = True  # False if the message is of another role than the assistant


def render_conversation(form: Conversation, template: ChatTemplate, everything: bool = False) -> list[Rendered]:
    """Return the conversation as one text, or one text per answer if the template rewrites earlier messages.

    Each supervised span ends with the template's stop token; if the template writes none, the EOS token is inserted.
    """
    filled = None if everything else fill_conversation(form, template)
    if filled is not None:
        return [filled]
    try:
        given = form.with_messages(_bare(message, template) for message in form.messages)
        made, foreign = _rendered(given, template, everything)
        lost = _find_lost(given, template, [text.text for text in made], everything)
    except LuthierError as error:
        bare = [_bare(message, template) for message in form.messages]
        raise name_culprit(error, bare, form.tools, template).at(form.where) from None
    if not lost and not foreign:
        if len(made) == 1 and not (everything or made[0].remarks or len(form.messages) > LONG):
            template.plans.learn(form, template, made[0].text, made[0].spans)
        return made
    last = last_answer(form)
    needed = (*foreign, *(part for part in lost if part.index <= last))
    behind = ("trailing",) * (len(needed) < len(foreign) + len(lost))
    return [attrs.evolve(made[0], lost=needed, remarks=made[0].remarks + behind), *made[1:]]


def fill_conversation(form: Conversation, template: ChatTemplate) -> Rendered | None:
    """Return the text of a conversation whose shape has a plan; None for another one."""
    filled = template.plans.fill(form, template)
    if filled is None:
        return None
    text, spans = filled
    return Rendered(text=text, spans=spans, where=form.where)


def _find_lost(form: Conversation, template: ChatTemplate, texts: list[str], everything: bool) -> list[Part]:
    def render(other: Conversation) -> list[str]:
        given = other.with_messages(_bare(message, template) for message in other.messages)
        return [text.text for text in _rendered(given, template, everything)[0]]

    return template.parts.find_lost(form, texts, render, everything)


def _rendered(form: Conversation, template: ChatTemplate, everything: bool) -> tuple[list[Rendered], list[Part]]:
    """Return the texts, and the answers that do not follow the prompt that generation gets."""
    messages = list(form.messages)
    whole = template.render(messages, form.tools)
    if everything and template.closes:
        return [Rendered(text=whole, spans=(), everything=True, where=form.where)], []
    trained = [i for i, on in enumerate(form.trained) if on and (form.may_be_empty or _says(messages[i]))]
    turns = [_find_any(messages, i, form.tools, template, whole) for i in trained]
    own = [turn for turn in turns if whole.startswith(turn.text[: turn.spans[-1][1]])]
    groups = [(whole, own)] if everything or len(own) == len(turns) else _part_turns(turns, whole)
    inside = ("special_tokens",) * any(template.has_special(message["content"]) for message in messages)
    foreign = [Part("prompt", i, "") for i, turn in zip(trained, turns, strict=True) if turn.foreign]
    made = []
    for written, group in groups:
        text, spans = _with_spans(written, group, template)
        made.append(Rendered(text=text, spans=spans, everything=everything, where=form.where, remarks=inside))
    return made, foreign


def _find_any(messages: list[dict[str, Any]], index: int, tools: Any, template: ChatTemplate, whole: str) -> Turn:
    """Return a supervised message of any role in the text that it is trained in."""
    if messages[index]["role"] == "assistant":
        return find_turn(messages, index, tools, template, whole)
    span = find_message(messages, index, tools, template, whole)
    return Turn(text=whole, spans=(span,), insert=None, answers=False)


def _part_turns(turns: list[Turn], whole: str) -> list[tuple[str, list[Turn]]]:
    """Return a text for each answer, and the whole one for the messages of other roles, if there are any."""
    others = [turn for turn in turns if not turn.answers]
    return [*((turn.text, [turn]) for turn in turns if turn.answers), *([(whole, others)] if others else [])]


def _says(message: dict[str, Any]) -> bool:
    return bool(message["content"] or message.get("tool_calls"))


def _bare(message: dict[str, Any], template: ChatTemplate) -> dict[str, Any]:
    """Return an assistant's message without stop tokens, and with its calls' arguments in the template's form."""
    if message["role"] != "assistant":
        return message
    bare = give_thought({**message, "content": template.bare(message["content"])}, template.thought_way)
    if "tool_calls" in message and template.text_arguments:
        bare["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return bare


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def find_turn(
    messages: list[dict[str, Any]], index: int, tools: Any, template: ChatTemplate, whole: str | None = None
) -> Turn:
    """Return the answer `messages[index]` in the text that the template writes up to it, or raise
    `template-unprovable`.

    Offsets come from generation tags, or from the end of the prompt (`add_generation_prompt`), or else from a probe.
    """
    message, last = messages[index], index + 1 == len(messages)
    prompt = template.render(messages[:index], tools, prompt=True) if index else ""
    if index and template.prompts and not _says(message):
        return _silent_turn(prompt, template)
    text = whole if last and whole is not None else template.render(messages[: index + 1], tools)
    spans = _tagged(messages, index, tools, template) if template.tagged else []
    start = spans[0][0] if spans else _start(messages, index, tools, template, text, prompt)
    moves = whole is not None and not whole.startswith(text[: _end(text, start, len(text), template)[0]])
    if not _contains(text[start:], message, ordered=moves):
        raise _unprovable(_why_changed(message, index, template, text[start:]), text[start : start + 200])
    limit = len(text)
    if spans and not text[spans[-1][1] :].lstrip().startswith(template.closing.lstrip() or template.stop):
        limit = spans[-1][1]  # the tags include the stop token
    end, insert = _end(text, start, limit, template)
    tagged = [span for span in spans if span[0] < end] or [(start, end)]  # nothing after the stop token
    own_spans = (*tagged[:-1], (tagged[-1][0], end))
    turn = Turn(text=text, spans=own_spans, insert=insert)
    if text.startswith(prompt):
        return turn
    return _moved(turn, prompt, find_answer(messages, index, tools, template, len(text) - own_spans[0][0]))


def _why_changed(message: dict[str, Any], index: int, template: ChatTemplate, text: str) -> str:
    calls = message.get("tool_calls", ())
    if calls and not template.writes_calls:
        return f"it writes no tool calls, but messages[{index}] has some"
    if calls and _said(message) and _said(message) not in text:
        return f"it does not write the text of messages[{index}] beside its calls"
    if calls and all(call["function"]["name"] in text for call in calls) and _said(message):
        return f"it moves the text of messages[{index}] behind the answers to its calls"
    if len(calls) > 1:
        return f"it writes fewer than the {len(calls)} calls of messages[{index}]"
    return f"it changes the text of messages[{index}]"


def _moved(turn: Turn, prompt: str, answer: str | None) -> Turn:
    """Return the answer after the prompt that generation gets. `foreign` is True if it is not known how it follows."""
    (start, _), end = turn.spans[0], turn.spans[-1][1]
    text = prompt + (answer or "")
    by = len(text) - len(turn.text)
    if turn.text.startswith(prompt[:start]):  # tags may begin before the end of the prompt
        start += len(os.path.commonprefix([turn.text[start:end], prompt[start:]]))
    said = turn.text[start:end].rpartition(CLOSE)[2].strip()
    if answer is None or not said or not text[: end + by].rstrip().endswith(said):
        return attrs.evolve(turn, foreign=True)
    spans = [(max(a + by, len(prompt)), b + by) for a, b in turn.spans]
    if not text[len(prompt) : spans[0][0]].strip() or prompt.rstrip().endswith(OPEN):
        spans[0] = (len(prompt), spans[0][1])  # the model itself writes what follows an opened thought
    return Turn(text=text, spans=tuple(spans), insert=None if turn.insert is None else turn.insert + by)


def _silent_turn(prompt: str, template: ChatTemplate) -> Turn:
    """Return an answer without text: the stop token right after the prompt that generation gets.

    Templates may leave out the end of the prompt together with the text.
    """
    text, start = prompt + template.tail, len(prompt)
    insert = None if template.closes else start
    return Turn(text=text, spans=((start, start + len(template.closing)),), insert=insert)


def _tagged(messages: list[dict[str, Any]], index: int, tools: Any, template: ChatTemplate) -> list[Span]:
    """Return the spans that the tags mark in this turn only."""
    before = len(template.tagged_spans(messages[:index], tools)[1]) if index else 0
    return template.tagged_spans(messages[: index + 1], tools)[1][before:]


def _start(
    messages: list[dict[str, Any]], index: int, tools: Any, template: ChatTemplate, text: str, prompt: str
) -> int:
    """Return where the answer begins: after the prompt that generation gets, or else where a probe begins."""
    if index and template.prompts and text.startswith(prompt):
        return len(prompt)
    probe = {"role": "assistant", "content": PROBE}
    header, is_written, _ = template.render([*messages[:index], probe], tools).rpartition(PROBE)
    blank = index and header.startswith(prompt) and not header[len(prompt) :].strip()
    if blank and text.startswith(prompt):
        return len(prompt)  # the model itself writes a space after [/INST]
    if not is_written or not text.startswith(header):
        shared = len(os.path.commonprefix([text, header]))
        begin = _thought_start(text, messages[index], shared)
        if begin is None:
            raise _unprovable(f"the beginning of the answer messages[{index}] cannot be found", text[-200:])
        return begin
    return len(header)


def _thought_start(text: str, message: dict[str, Any], limit: int) -> int | None:
    """Return where the message's thought begins, if the template writes an empty one there, at `limit` or before."""
    thought = split_thought(message)[0]
    begin = text.rfind(OPEN, 0, limit + len(OPEN))
    is_there = bool(thought) and begin >= 0 and text[begin + len(OPEN) :].lstrip().startswith(thought)
    return begin if is_there else None


def _contains(text: str, message: dict[str, Any], *, ordered: bool) -> bool:
    """Return True if a text holds an answer: its content after any <think> block, and its calls' names in order.

    Unless all is `ordered`, the content may stand behind the calls.
    """
    said = _said(message)
    rest = text.partition(said)[2] if ordered and said and said in text else text
    for call in message.get("tool_calls", ()):
        before, name, rest = rest.partition(call["function"]["name"])
        if not name:
            return False
    return said in text


def _said(message: dict[str, Any]) -> str:
    return str(message["content"].rpartition(CLOSE)[2].strip())


def _end(text: str, start: int, limit: int, template: ChatTemplate) -> tuple[int, int | None]:
    """Return where the span ends, and the position for a stop token if the template writes none there."""
    segment = text[start:limit]
    if segment.endswith(template.tail):
        said = limit - len(template.tail)
        return said + len(template.closing), None if template.closes else said
    end = start + len(segment.rstrip())
    return end, None if template.closes and template.ending(segment) else end


def _with_spans(text: str, turns: list[Turn], template: ChatTemplate) -> tuple[str, tuple[Span, ...]]:
    """Return the text with stop tokens inserted where the template writes none, and the turns' spans in it."""
    stop = template.stop
    spans: list[Span] = []
    shift = 0
    for turn in sorted(turns, key=lambda turn: turn.spans[0]):  # a template may write the system prompt later
        moved = [(start + shift, end + shift) for start, end in turn.spans]
        if turn.insert is not None:
            at = turn.insert + shift
            if not text.startswith(stop, at):  # a template may end all answers but the last with one
                text = text[:at] + stop + text[at:]
                shift += len(stop)
            moved[-1] = (moved[-1][0], moved[-1][1] + len(stop))
        spans += moved
    return text, tuple(spans)


def _unprovable(problem: str, text: str) -> LuthierError:
    remedy = "Use a template that writes all of it, or write it as text." if "call" in problem else None
    problem = f"the chat template cannot be trained on: {problem}"
    return LuthierError("template-unprovable", problem, found=text, remedy=remedy)
