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
SCALARS: Final = frozenset((str, int, float, bool, type(None)))
SEQUENCES: Final[Mapping[type, str]] = {
    tuple: "tuple",
    frozenset: "frozenset",
}  # types of whole fields, which JSON has as lists
MAKERS: Final = {"": lambda value: value, "tuple": tuple, "frozenset": frozenset}


class PackedRows(Sequence[Item]):
    """A sequence of attrs objects that can only be appended to.

    A block whose fields hold what JSON has alone, or tuples and frozensets of that, is kept as compressed JSON, a fifth
    of the memory of the objects; other blocks, and those that are nested too deeply, are kept as they are. Each reading
    gives new, equal objects. Reading in order unpacks every block once.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._blocks: list[bytes | list[Item]] = []
        self._last: list[Item] = []  # of a block that is not full
        self._classes: list[type] = []
        self._opened: tuple[int, list[Item]] = (-1, [])  # the block that was read last
        for item in items:
            self.append(item)

    def append(self, item: Item) -> None:
        """Add an item at the end."""
        self._last.append(item)
        if len(self._last) == BLOCK:
            try:
                self._blocks.append(self._pack(self._last))
            except (
                RecursionError,
                ValueError,
            ):  # nested too deeply for JSON, or a number of more digits than it writes
                self._blocks.append(self._last)
            self._last = []

    def __len__(self) -> int:
        return len(self._blocks) * BLOCK + len(self._last)

    def __iter__(self) -> Iterator[Item]:
        for number in range(len(self._blocks)):
            yield from self._unpack(self._blocks[number])
        yield from self._last

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        return [self._at(place) for place in places] if isinstance(places, range) else self._at(places)

    def _at(self, place: int) -> Item:
        number, inner = divmod(place, BLOCK)
        if number == len(self._blocks):
            return self._last[inner]
        if self._opened[0] != number:
            self._opened = (number, self._unpack(self._blocks[number]))
        return self._opened[1][inner]

    def _pack(self, items: list[Item]) -> bytes | list[Item]:
        """Return the items as bytes, or as they are where one of them holds what JSON has not."""
        packed = []
        for item in items:
            kind: type = type(item)
            values = [getattr(item, name) for name in _fields(kind)]
            if not all(map(_is_plain_field, values)):
                return items
            if kind not in self._classes:
                self._classes.append(kind)
            made = [SEQUENCES.get(type(value), "") for value in values]
            packed.append(
                [self._classes.index(kind), made, [list(v) if m else v for m, v in zip(made, values, strict=True)]]
            )
        return zlib.compress(json.dumps(packed).encode(), 1)

    def _unpack(self, block: bytes | list[Item]) -> list[Item]:
        if isinstance(block, list):
            return block
        items = []
        for number, made, values in json.loads(zlib.decompress(block)):
            kind = self._classes[number]
            fields = zip(_fields(kind), made, values, strict=True)
            items.append(kind(**{name: MAKERS[maker](value) for name, maker, value in fields}))
        return items


def _is_plain_field(value: Any) -> bool:
    """Return whether a field holds plain values, at its top in a tuple or a frozenset too."""
    return all(map(_is_plain, value)) if type(value) in SEQUENCES else _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Return whether a value is built of what JSON has alone, all of it of these types exactly."""
    kind = type(value)
    if kind is dict:
        return all(type(key) is str for key in value) and all(map(_is_plain, value.values()))
    return kind in SCALARS or (kind is list and all(map(_is_plain, value)))


@functools.cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in attrs.fields(kind))
