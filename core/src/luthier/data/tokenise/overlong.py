"""Examples longer than max_length: dropped, truncated, split, or an error; the caller counts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import attrs

from luthier.data.examples import TokenExample
from luthier.data.formats.forms import Conversation, Document, Form, Tokens
from luthier.data.read.row import broken_row
from luthier.data.tokenise.supervised_spans import LONG, Rendered
from luthier.errors import LuthierError
from luthier.recipe.schema import Data, Overlong

if TYPE_CHECKING:
    from luthier.data.tokenise.chat_template import ChatTemplate
    from luthier.data.tokenise.encode import Encoder

MOST_MESSAGES: Final = 2048  # of a conversation; the time to find its answers grows with the square of this number


def overlong_policy(asked: str, form: Form, where: str) -> Overlong:
    """Return what happens to a form's overlong examples. Raises `recipe-conflict` if a conversation would be split."""
    splits = isinstance(form, (Document, Tokens)) and not form.texts
    if asked == "split" and not splits:
        problem = "overlong: split is for plain text and pre-tokenised rows; this row has parts that belong together"
        remedy = "Use overlong: drop, truncate or error."
        raise LuthierError("recipe-conflict", problem, where=where, remedy=remedy)
    if asked == "auto":
        return "split" if splits else "drop"
    return asked  # type: ignore[return-value]


def is_overlong(form: Conversation, template: ChatTemplate, encoder: Encoder, data: Data) -> bool:
    """Return True if a conversation of many messages is longer than max_length, which its whole text shows.

    False for one that the template refuses, which is told, with its place, where its answers are found.
    """
    if len(form.messages) <= LONG:
        return False
    try:
        text = template.with_settings(form.settings).render(list(form.messages), form.tools)
    except LuthierError:
        return False
    tokens, _ = encoder.encode([Rendered(text=text, spans=(), everything=True, where=form.where)])
    return len(tokens.input_ids) > data.max_length


def check_messages(form: Conversation) -> None:
    """Raise `data-row` for a conversation of more messages than are looked through."""
    if len(form.messages) > MOST_MESSAGES:
        problem = f"the conversation has {len(form.messages)} messages, and at most {MOST_MESSAGES} are read"
        raise broken_row(problem, where=f"{form.where}: messages")


def fit_length(example: TokenExample, max_length: int, policy: Overlong) -> Iterator[tuple[TokenExample | None, str]]:
    """Yield the examples to keep, each with what happened to it, and (None, reason) for what is dropped.

    A truncated example keeps the part of its span that fits; nothing without a supervised token is kept.
    """
    length = len(example.input_ids)
    if length <= max_length:
        yield (example, "") if example.num_supervised else (None, "unsupervised")
    elif policy == "error":
        problem = f"the row has {length} tokens, max_length is {max_length}"
        raise LuthierError("data-overlong", problem, where=example.where)
    elif policy == "drop":
        yield None, "overlong"
    elif policy == "truncate":
        short = _part(example, 0, max_length)
        yield (short, "truncated") if short.num_supervised else (None, "truncated_unsupervised")
    else:
        for start in range(0, length, max_length):
            part = _part(example, start, start + max_length)
            yield (part, "split" if start == 0 else "") if part.num_supervised else (None, "split_unsupervised")


def fit_unit(example: TokenExample, max_length: int, policy: Overlong, reason: str) -> tuple[TokenExample | None, str]:
    """Return a unit of several documents with what happened to it, or (None, reason) if it is dropped.

    `max_length` bounds each document; a truncated one loses its end. `reason` is the word for a dropped one.
    """
    if example.longest <= max_length:
        return example, ""
    if policy == "error":
        problem = f"a document of the row has {example.longest} tokens, max_length is {max_length}"
        raise LuthierError("data-overlong", problem, where=example.where)
    if policy == "drop":
        return None, reason
    parts = {name: _part(part, 0, max_length) for name, part in example.by_name().items()}
    if any(not part.num_supervised for part in parts.values()):
        return None, "truncated_unsupervised"
    return TokenExample.joined(parts), "truncated"


def _part(example: TokenExample, start: int, end: int) -> TokenExample:
    return attrs.evolve(example, input_ids=example.input_ids[start:end], labels=example.labels[start:end])
