"""Packed rows: a sequence of millions of rows in little memory, in compressed blocks unpacked one at a time."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import attrs

Item = TypeVar("Item")
BLOCK: Final = 256  # rows that are packed together
TEXT: Final = frozenset((str,))
SCALARS: Final = frozenset((str, int, float, bool, type(None)))
MAKERS: Final[Mapping[type, Any]] = {tuple: tuple, frozenset: frozenset}  # types of whole fields, lists in JSON
Layout = tuple[type, tuple[type | None, ...]]  # the class of an item, and of each field the one of those types, or None


@attrs.frozen
class PackedBlock(Sequence[Item]):
    """The rows of a full block, as compressed JSON. Each reading gives new, equal objects."""

    octets: bytes
    layouts: tuple[Layout, ...]

    def __len__(self) -> int:
        return BLOCK

    def __iter__(self) -> Iterator[Item]:
        opened = [(kind, _fields(kind), [(i, m) for i, m in enumerate(made) if m]) for kind, made in self.layouts]
        for number, values in json.loads(zlib.decompress(self.octets)):
            kind, names, made = opened[number]
            for place, maker in made:
                values[place] = maker(values[place])
            yield kind(**dict(zip(names, values, strict=True)))

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class PackedRows(Sequence[Item]):
    """A sequence of attrs objects that can only be appended to.

    A block whose fields hold what JSON has alone, or tuples and frozensets of that, is kept as compressed JSON, a fifth
    of the memory of the objects; other blocks, and those that are nested too deeply, are kept as they are. Each reading
    gives new, equal objects. Reading in order unpacks every block once.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._blocks: list[PackedBlock[Item] | list[Item]] = []
        self._last: list[Item] = []  # of a block that is not full
        self._opened: tuple[int, list[Item]] = (-1, [])  # the block that was read last
        for item in items:
            self.append(item)

    def append(self, item: Item) -> None:
        """Add an item at the end."""
        self._last.append(item)
        if len(self._last) == BLOCK:
            self._blocks.append(_packed(self._last))
            self._last = []

    def __len__(self) -> int:
        return len(self._blocks) * BLOCK + len(self._last)

    def __iter__(self) -> Iterator[Item]:
        for block in self.blocks():
            yield from block

    def blocks(self) -> Iterator[Sequence[Item]]:
        """Yield the items in blocks, which unpack themselves where they are read."""
        yield from self._blocks
        if self._last:
            yield self._last

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        return [self._at(place) for place in places] if isinstance(places, range) else self._at(places)

    def _at(self, place: int) -> Item:
        number, inner = divmod(place, BLOCK)
        if number == len(self._blocks):
            return self._last[inner]
        if self._opened[0] != number:
            self._opened = (number, list(self._blocks[number]))
        return self._opened[1][inner]


def _packed(items: list[Item]) -> PackedBlock[Item] | list[Item]:
    """Return a block of the items, or the items as they are where one of them holds what JSON has not."""
    layouts: dict[Layout, int] = {}
    packed = []
    try:
        for item in items:
            kind: type = type(item)
            values = [getattr(item, name) for name in _fields(kind)]
            if not all(map(_is_plain_field, values)):
                return items
            layout = (kind, tuple([type(value) if type(value) in MAKERS else None for value in values]))
            packed.append((layouts.setdefault(layout, len(layouts)), values))
        text = json.dumps(packed, default=list)  # of the frozensets, which JSON has not
    except (RecursionError, ValueError):  # nested too deeply, or a number of more digits than JSON is written with
        return items
    return PackedBlock(zlib.compress(text.encode(), 1), tuple(layouts))


def _is_plain_field(value: Any) -> bool:
    """Return whether a field holds plain values, at its top in a tuple or a frozenset too."""
    return all(map(_is_plain, value)) if type(value) in MAKERS else _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Return whether a value is built of what JSON has alone, all of it of these types exactly."""
    kind = type(value)
    if kind is dict:
        is_flat = SCALARS.issuperset(map(type, value.values()))
        return TEXT.issuperset(map(type, value)) and (is_flat or all(map(_is_plain, value.values())))
    if kind is list:
        return SCALARS.issuperset(map(type, value)) or all(map(_is_plain, value))
    return kind in SCALARS


@functools.cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in attrs.fields(kind))
