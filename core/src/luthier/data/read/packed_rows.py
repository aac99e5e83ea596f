"""Packed rows: a sequence of millions of rows in little memory, in compressed blocks unpacked one at a time."""

from __future__ import annotations

import marshal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

import attrs

Item = TypeVar("Item")
BLOCK: Final = 256  # rows that are packed together
SCALARS: Final = frozenset((str, int, float, bool, type(None), bytes))


class PackedRows(Sequence[Item]):
    """A sequence of attrs objects to which objects can only be appended.

    A block whose fields hold only plain values (what JSON has, bytes, tuples and sets) is stored as compressed bytes, a
    fifth of the memory of the objects; other blocks are stored as they are. Each reading gives new, equal objects.
    Reading in order unpacks every block once.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._blocks: list[bytes | list[Item]] = []
        self._last: list[Item] = []  # of a block that is not full
        self._classes: list[type] = []
        self._opened: tuple[int, list[Item]] = (-1, [])  # number and items of the block that was read last
        for item in items:
            self.append(item)

    def append(self, item: Item) -> None:
        self._last.append(item)
        if len(self._last) == BLOCK:
            self._blocks.append(self._pack(self._last))
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
        """Return the items as bytes, or unchanged if a field holds an object of which marshal would lose a part."""
        values = [self._values(item) for item in items]
        return zlib.compress(marshal.dumps(values), 1) if _is_plain(values) else items

    def _values(self, item: Any) -> tuple[Any, ...]:
        kind = type(item)
        if kind not in self._classes:
            self._classes.append(kind)
        return (self._classes.index(kind), *(getattr(item, name) for name in _fields(kind)))

    def _unpack(self, block: bytes | list[Item]) -> list[Item]:
        if isinstance(block, list):
            return block
        packed = marshal.loads(zlib.decompress(block))  # safe, because this object has written the bytes itself
        kinds = [(kind, _fields(kind)) for kind in self._classes]
        return [kinds[k][0](**dict(zip(kinds[k][1], values, strict=True))) for k, *values in packed]


def _is_plain(value: Any) -> bool:
    """Return True if a value consists of plain values only, all of exactly these types."""
    kind = type(value)
    if kind is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return kind in SCALARS or (kind in (list, tuple, frozenset) and all(map(_is_plain, value)))


def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in attrs.fields(kind))
