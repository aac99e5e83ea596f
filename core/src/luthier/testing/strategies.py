"""Hypothesis strategies: options drawn from their own metadata, and documents to pack."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Final

import attrs
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from luthier.errors import LuthierError
from luthier.plugins.options import KEY, Bounds, field_hints

NEAR: Final = 8  # the largest distance from its default at which an unbounded integer is drawn


def options_of(cls: type, examples: Sequence[object] = ()) -> SearchStrategy[Any]:
    """Return a strategy of a class's options: its default first, then `examples`, then others within bounds and
    choices.

    Numbers, booleans, choices, literals and lists of these vary; text, paths and mappings keep the value of the default
    or the example, because only the author knows others. Numbers without bounds stay near their default. Raises
    `plugin-invalid` if a required option cannot be drawn and is in no example.
    """
    starts = bases_of(cls, examples)
    return st.sampled_from(starts) | st.sampled_from(starts).flatmap(_varied)


def bases_of(cls: type, examples: Sequence[object] = ()) -> list[Any]:
    """Return the default options, if every required one can be given a value, and the author's examples."""
    given: dict[str, Any] = {}
    unknown = []
    for field in attrs.fields(cls):
        if field.default is attrs.NOTHING and field.init:
            values = _values(field_hints(cls)[field.name], _bounds(field), None)
            if values is None:
                unknown.append(field.name)
            else:
                given[field.name] = _first(field_hints(cls)[field.name], _bounds(field))
    if not unknown:
        return [cls(**given), *examples]
    if examples:
        return list(examples)
    raise LuthierError(
        "plugin-invalid",
        f"the kit cannot invent a value for the required option {', '.join(unknown)}",
        where=cls.__name__,
        remedy=f"Pass examples=[{cls.__name__}({unknown[0]}=...)].",
    )


def _first(hint: Any, bounds: Bounds) -> Any:
    """Return the simplest value of a required option."""
    if bounds.choices is not None:
        return bounds.choices[0]
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)[0]
    if _is_union(hint):
        return _first(typing.get_args(hint)[0], bounds)
    if hint is bool:
        return False
    low = bounds.low if bounds.low is not None else (bounds.high if bounds.high is not None else 1)
    return hint(low) if hint in (int, float) else hint()


@st.composite
def _varied(draw: st.DrawFn, base: Any) -> Any:
    """Draw options that differ from `base` in any of the fields that can vary."""
    cls: Any = type(base)
    changes = {}
    for field in attrs.fields(cls):
        values = (
            _values(field_hints(cls)[field.name], _bounds(field), getattr(base, field.name)) if field.init else None
        )
        if values is not None:
            changes[field.name] = draw(st.just(getattr(base, field.name)) | values)
    try:
        return attrs.evolve(base, **changes)
    except LuthierError:  # the class refuses this combination
        assume(False)


def _bounds(field: attrs.Attribute[Any]) -> Bounds:
    return field.metadata.get(KEY) or Bounds(help="")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _values(hint: Any, bounds: Bounds, value: Any) -> SearchStrategy[Any] | None:
    """Return a strategy of a type's values within bounds, of a size like `value`; None if only the author knows any."""
    if _is_union(hint):
        members = [m for m in (_values(member, bounds, value) for member in typing.get_args(hint)) if m is not None]
        return st.one_of(members) if members else None
    if typing.get_origin(hint) in (list, tuple):
        return _sequences(hint, bounds, value)
    return _scalars(hint, bounds, value)


def _scalars(hint: Any, bounds: Bounds, value: Any) -> SearchStrategy[Any] | None:
    if hint is type(None):
        return st.none()
    if typing.get_origin(hint) is typing.Literal or bounds.choices is not None:
        return st.sampled_from(bounds.choices or typing.get_args(hint))
    if hint is bool:
        return st.booleans()
    if hint in (int, float):
        near = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
        return _integers(bounds, near) if hint is int else _floats(bounds, near)
    return _varied(value) if attrs.has(hint) and isinstance(value, hint) else None


def _sequences(hint: Any, bounds: Bounds, value: Any) -> SearchStrategy[Any] | None:
    """Return a strategy of lists as long as the value; of up to three items if it is empty or None."""
    kind, arguments = typing.get_origin(hint), [a for a in typing.get_args(hint) if a is not Ellipsis]
    items = list(value) if isinstance(value, (list, tuple)) else []
    if kind is tuple and Ellipsis not in typing.get_args(hint):
        parts = [_values(a, bounds, v) for a, v in zip(arguments, items or [None] * len(arguments), strict=False)]
        return None if None in parts or len(parts) != len(arguments) else st.tuples(*parts)
    if items:
        parts = [_values(arguments[0], bounds, item) for item in items]
        return None if None in parts else st.tuples(*parts).map(kind)
    each = _values(arguments[0], bounds, None) if arguments else None
    return None if each is None else st.lists(each, max_size=3).map(kind)


def _integers(bounds: Bounds, value: float | None) -> SearchStrategy[int]:
    centre = int(value) if value is not None else int(bounds.low or 0)
    low = int(bounds.low) if bounds.low is not None else centre - NEAR
    high = max(low, centre) + NEAR
    drawn = st.integers(low, high if bounds.high is None else min(high, int(bounds.high)))
    return _edges(bounds, int, widest=100) | drawn


def _floats(bounds: Bounds, value: float | None) -> SearchStrategy[float]:
    """Return a strategy of floats with six digits, which can be read in a failing example."""
    centre = abs(float(value)) if value is not None else 0.0
    low = float(bounds.low) if bounds.low is not None else -4 * centre - 1.0
    high = float(bounds.high) if bounds.high is not None else max(4 * centre, low) + 1.0
    drawn = st.floats(low, high, allow_subnormal=False)
    return _edges(bounds, float, widest=math.inf) | drawn.map(lambda n: min(max(float(f"{n:.6g}"), low), high))


def _edges(bounds: Bounds, kind: type, widest: float) -> SearchStrategy[Any]:
    """Return a strategy of the bounds themselves, which the part must accept, except bounds so far that they cost
    memory.
    """
    declared = [b for b in (bounds.low, bounds.high) if b is not None and abs(b) <= widest]
    return st.sampled_from([kind(b) for b in declared]) if declared else st.nothing()


@attrs.frozen(kw_only=True)
class Document:
    """One document: its tokens, which of them are supervised, and the weight of its example."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    weight: float = 1.0


def drawn_documents(
    vocabulary: int = 7, longest: int = 6, weights: Sequence[float] = (1.0,)
) -> SearchStrategy[Document]:
    """Return a strategy of documents of 2 to `longest` tokens, with at least one supervised token that can be
    predicted.
    """

    def of_length(length: int) -> SearchStrategy[Document]:
        ids = st.tuples(*[st.integers(0, vocabulary - 1)] * length)
        marks = st.tuples(*[st.booleans()] * length).map(lambda m: m if any(m[1:]) else (*m[:-1], True))
        return st.builds(Document, ids=ids, supervised=marks, weight=st.sampled_from(tuple(weights)))

    return st.integers(2, longest).flatmap(of_length)


def packs(weights: Sequence[float] = (1.0, 0.5, 2.0)) -> SearchStrategy[list[Document]]:
    """Return a strategy of one to three documents that are packed into one batch."""
    return st.lists(drawn_documents(weights=weights), min_size=1, max_size=3)


def drawn_seeds() -> SearchStrategy[int]:
    return st.integers(0, 2**16)


def pack(drawn: Sequence[Document]) -> Any:
    """Return the batch of these documents."""
    import numpy as np

    from luthier.data.batches.batch import collate_examples
    from luthier.data.examples import IGNORED, TokenExample

    examples = []
    for document in drawn:
        ids = np.array(document.ids, np.int32)
        labels = np.where(np.array(document.supervised), ids, IGNORED).astype(np.int32)
        examples.append(TokenExample(input_ids=ids, labels=labels, weight=document.weight))
    return collate_examples(examples)
