"""Plans of rows: the text and the supervised spans of a conversation, joined from what its shape is known to give.

A template is followed once for each shape (the roles, which messages are supervised) with unknown contents, and once
more for each other set of answers to what it asks about them. The result is a list of known texts and of places for
contents. Where it shows, for every content, that each answer follows the prompt that generation gets, ends as the
template ends answers, and that no message is lost, later rows of the shape are filled in, and no template is called.
A first row of each plan is compared with what the template writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, Protocol

import attrs

from luthier.data.formats.forms import Conversation
from luthier.data.tokenise.shapes.symbolic_text import Piece, Question, Slot, Trace
from luthier.data.tokenise.thoughts import OPEN
from luthier.timestamp import format_now

MOST_SHAPES: Final = 1024
MOST_VARIANTS: Final = 8  # plans of one shape, for different answers to what the template asks
TRIES: Final = 3  # rows of a shape that are followed in vain before it is left alone
Span = tuple[int, int]
Place = tuple[int, int]  # a piece, and a character in it


class TracedTemplate(Protocol):
    """A chat template that can be followed: the members of `ChatTemplate` that plans are made from."""

    @property
    def tail(self) -> str: ...

    @property
    def closing(self) -> str: ...

    @property
    def prompts(self) -> bool: ...

    @property
    def closes(self) -> bool: ...

    @property
    def tagged(self) -> bool: ...

    @property
    def stops(self) -> tuple[str, ...]: ...

    def has_special(self, content: str) -> bool: ...

    def trace(self, roles: Sequence[str], trace: Trace, prompt: bool = False) -> tuple[Piece, ...]: ...


@attrs.frozen(kw_only=True)
class RowPlan:
    """The pieces of a text, and the places in them where supervised spans begin and end."""

    pieces: tuple[Piece, ...]
    spans: tuple[tuple[Place, Place], ...]
    questions: tuple[tuple[Question, bool], ...]
    dates: tuple[tuple[str, str], ...]

    def fits(self, contents: Sequence[str]) -> bool:
        """Return True if the template takes the same way for messages with these contents, today."""
        for question, answer in self.questions:
            if question.answer(contents) is not answer:
                return False
        return all(format_now(form) == text for form, text in self.dates)

    def fill(self, contents: Sequence[str]) -> tuple[str, tuple[Span, ...]]:
        """Return the text and its spans for messages with these contents."""
        parts = [piece if type(piece) is str else piece.fill(contents) for piece in self.pieces]  # type: ignore[union-attr]
        ends = [0, *accumulate(map(len, parts))]
        return "".join(parts), tuple((ends[a] + i, ends[b] + j) for (a, i), (b, j) in self.spans)


@attrs.define
class RowPlans:
    """The plans of a template, by shape. `failed` counts the rows of a shape that gave none."""

    known: dict[Any, list[RowPlan]] = attrs.field(factory=dict)
    failed: dict[Any, int] = attrs.field(factory=dict)

    def fill(self, form: Conversation, template: TracedTemplate) -> tuple[str, tuple[Span, ...]] | None:
        """Return the text and the spans of a conversation; None if no plan is known that is right for it."""
        contents = plain_contents(form, template)
        if contents is None:
            return None
        for plan in self.known.get(_shape(form), ()):
            if plan.fits(contents):
                return plan.fill(contents)
        return None

    def learn(self, form: Conversation, template: TracedTemplate, text: str, spans: tuple[Span, ...]) -> None:
        """Follow the template for a row of which it is known what it gives, so that later rows are filled in."""
        contents, shape = plain_contents(form, template), _shape(form)
        if contents is None or self.failed.get(shape, 0) >= TRIES or len(self.known) >= MOST_SHAPES:
            return
        plans = self.known.setdefault(shape, [])
        plan = make_plan(form, contents, template) if len(plans) < MOST_VARIANTS else None
        if plan is not None and plan.fill(contents) == (text, spans):
            plans.append(plan)
        else:
            self.failed[shape] = self.failed.get(shape, 0) + 1


def plain_contents(form: Conversation, template: TracedTemplate) -> list[str] | None:
    """Return the contents of messages; None if a message has more than a text, or a text that templates rewrite."""
    if form.tools or form.flags or form.may_be_empty:
        return None
    contents = []
    for message, trained in zip(form.messages, form.trained, strict=True):
        content = message["content"]
        if len(message) != 2 or (trained and not content) or template.has_special(content):
            return None
        if message["role"] == "assistant" and (OPEN in content or any(stop in content for stop in template.stops)):
            return None
        contents.append(content)
    return contents


def _shape(form: Conversation) -> Any:
    return tuple([message["role"] for message in form.messages]), form.trained


def make_plan(form: Conversation, contents: list[str], template: TracedTemplate) -> RowPlan | None:
    """Return the plan of a conversation's shape; None if it is not certain for every content."""
    if not (template.prompts and template.closes and any(form.trained)) or template.tagged:
        return None
    trace = Trace(contents)
    roles = [message["role"] for message in form.messages]
    try:
        whole = template.trace(roles, trace)
        spans = [_span(index, roles, whole, trace, template) for index, on in enumerate(form.trained) if on]
    except Exception:  # what a template raises for unknown contents may be of any kind
        return None
    slots = {piece.index for piece in whole if isinstance(piece, Slot)}
    if None in spans or slots != set(range(len(roles))):
        return None
    return RowPlan(
        pieces=whole,
        spans=tuple(span for span in spans if span is not None),
        questions=tuple(trace.answers.items()),
        dates=tuple(trace.dates.items()),
    )


def _span(
    index: int, roles: list[str], whole: tuple[Piece, ...], trace: Trace, template: TracedTemplate
) -> tuple[Place, Place] | None:
    """Return where the span of a message begins and ends; None unless that is so for every content."""
    if roles[index] != "assistant":
        return _said(index, whole, template)
    if not index:
        return None
    prompt = template.trace(roles[:index], trace, prompt=True)
    text = template.trace(roles[: index + 1], trace)
    last, tail = text[-1], template.tail
    start, end = _end_of(prompt, text), len(text) - 1
    if start is None or not isinstance(last, str) or not tail or not last.endswith(tail):
        return None
    answer = [piece for piece in text[start[0] + 1 : end] if isinstance(piece, Slot)]
    stop = (end, len(last) - len(tail) + len(template.closing))
    if [slot.index for slot in answer] != [index] or _end_of((*text[:-1], last[: stop[1]]), whole) is None:
        return None
    return start, stop


def _said(index: int, whole: tuple[Piece, ...], template: TracedTemplate) -> tuple[Place, Place] | None:
    """Return where a message of another role begins, and where it or the stop token right after it ends."""
    places = [place for place, piece in enumerate(whole) if isinstance(piece, Slot) and piece.index == index]
    if len(places) != 1:
        return None
    after = whole[places[0] + 1] if places[0] + 1 < len(whole) else ""
    ended = isinstance(after, str) and after.startswith(template.closing)
    return (places[0], 0), (places[0] + 1, len(template.closing) if ended else 0)


def _end_of(begin: tuple[Piece, ...], text: tuple[Piece, ...]) -> Place | None:
    """Return the place where `begin` ends in a text that begins with it for every content; None if it may not."""
    place = len(begin) - 1
    if place < 0 or begin[:place] != text[:place] or len(text) <= place:
        return None
    mine, own = begin[place], text[place]
    if not isinstance(mine, str) or not isinstance(own, str) or not own.startswith(mine):
        return None
    return place, len(mine)
