"""Texts with unknown parts: what a template does with a message, followed without knowing the message's content."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Final, NoReturn

import attrs

STRIPS: Final = ("strip", "lstrip", "rstrip")
QUESTIONS: Final = ("startswith", "endswith")


class UnknownText(Exception):
    """A template looks at a text in a way that cannot be followed."""


@attrs.frozen
class Slot:
    """The content of message `index`, of which `strips` were taken in turn: each a method of str and its argument."""

    index: int
    strips: tuple[tuple[str, str | None], ...] = ()

    def fill(self, contents: Sequence[str]) -> str:
        """Return what stands here if the messages have these contents."""
        text = contents[self.index]
        for method, characters in self.strips:
            text = getattr(text, method)(characters)
        return text


@attrs.frozen
class Question:
    """What a template asks about a content: a method of str, and its argument."""

    slot: Slot
    method: str
    argument: Any

    def answer(self, contents: Sequence[str]) -> bool:
        """Return the answer for messages with these contents."""
        text = self.slot.fill(contents)
        return bool(text) if self.method == "__bool__" else bool(getattr(text, self.method)(self.argument))


@attrs.define
class Trace:
    """The questions that a template asks about the contents of messages, and the answers that it got."""

    contents: Sequence[str]
    answers: dict[Question, bool] = attrs.field(factory=dict)
    dates: dict[str, str] = attrs.field(factory=dict)  # formats of today's date, and what stood there

    def ask(self, question: Question) -> bool:
        """Return the answer for the messages that are followed, and remember it."""
        return self.answers.setdefault(question, question.answer(self.contents))


Piece = str | Slot


class SymbolicText:
    """A text that holds contents of messages. It takes part in what templates do with texts; the rest raises.

    It is no str, so that nothing can look inside without being noticed.
    """

    __hash__ = None  # type: ignore[assignment]  # a key of a dict would be compared unseen

    def __init__(self, trace: Trace, pieces: Sequence[Piece]) -> None:
        self._trace, self._pieces = trace, tuple(pieces)

    @property
    def luthier_pieces(self) -> tuple[Piece, ...]:
        """Return its known and unknown parts. The name is one that no template asks for."""
        return self._pieces

    def luthier_joined(self, pieces: Iterable[Piece]) -> SymbolicText:
        """Return another text of the same conversation."""
        return SymbolicText(self._trace, tuple(pieces))

    def __add__(self, other: object) -> SymbolicText:
        return join_texts((self, _text(other)))

    def __radd__(self, other: object) -> SymbolicText:
        return join_texts((_text(other), self))

    def __bool__(self) -> bool:
        if any(isinstance(piece, str) for piece in self._pieces):
            return True
        return self._ask("__bool__", None)

    def __contains__(self, part: object) -> bool:
        return self._ask("__contains__", _plain(part))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SymbolicText):
            raise UnknownText
        return isinstance(other, str) and self._ask("__eq__", _plain(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __getattr__(self, name: str) -> Any:
        if name in STRIPS:
            return functools.partial(self._strip, name)
        if name in QUESTIONS:
            return functools.partial(self._begins, name)
        raise UnknownText

    def _strip(self, method: str, characters: str | None = None) -> SymbolicText:
        slot = self._slot()
        if characters is not None and _plain(characters).strip():
            raise UnknownText  # more than white space: an answer would not be written whole
        strips = slot.strips if (method, characters) in slot.strips[-1:] else (*slot.strips, (method, characters))
        return SymbolicText(self._trace, (attrs.evolve(slot, strips=strips),))

    def _begins(self, method: str, part: object) -> bool:
        parts = part if isinstance(part, tuple) else (part,)
        return self._ask(method, tuple(map(_plain, parts)))

    def _ask(self, method: str, argument: Any) -> bool:
        return self._trace.ask(Question(self._slot(), method, argument))

    def _slot(self) -> Slot:
        """Return the content that this text is; of a text with more than one part nothing can be asked."""
        (piece, *others) = self._pieces
        if others or not isinstance(piece, Slot):
            raise UnknownText
        return piece

    def _refuse(self, *_: object) -> NoReturn:
        raise UnknownText

    __iter__ = __len__ = __getitem__ = __str__ = __repr__ = __format__ = _refuse


def join_texts(values: Iterable[Any]) -> Any:
    """Return the texts of some values, joined: a str if all of it is known."""
    parts = [value if isinstance(value, SymbolicText) else str(value) for value in values]
    unknown = next((part for part in parts if isinstance(part, SymbolicText)), None)
    if unknown is None:
        return "".join(map(str, parts))
    return unknown.luthier_joined(_merged(piece for part in parts for piece in pieces_of(part)))


def pieces_of(text: Any) -> tuple[Piece, ...]:
    """Return the known and unknown parts of a text."""
    return text.luthier_pieces if isinstance(text, SymbolicText) else (text,)


def _merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the pieces with neighbouring known texts joined, and without empty ones."""
    for is_known, group in groupby(pieces, lambda piece: isinstance(piece, str)):
        if not is_known:
            yield from group
        elif known := "".join(map(str, group)):
            yield known


def _plain(value: object) -> str:
    if not isinstance(value, str):
        raise UnknownText
    return value


def _text(value: object) -> Any:
    return value if isinstance(value, SymbolicText) else _plain(value)
