"""Unit: a row as `Loss.arrange` sees it, its documents under their names. It is never divided between batches."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.examples import IGNORED, TokenExample
from luthier.errors import LuthierError


@attrs.frozen(kw_only=True, eq=False)
class Passage:
    """Tokens [L] with their unshifted labels [L], -100 where not supervised: a document of a unit, or a part of one."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __add__(self, other: Passage) -> Passage:
        ids, labels = (self.input_ids, other.input_ids), (self.labels, other.labels)
        return Passage(input_ids=np.concatenate(ids), labels=np.concatenate(labels))

    @property
    def prompt(self) -> Passage:
        """What comes before the first supervised token."""
        return self.cut(0, self._first)

    @property
    def answer(self) -> Passage:
        """What begins with the first supervised token."""
        return self.cut(self._first, len(self))

    def cut(self, start: int, end: int) -> Passage:
        """Return the tokens from `start` to before `end`."""
        return Passage(input_ids=self.input_ids[start:end], labels=self.labels[start:end])

    @property
    def _first(self) -> int:
        supervised = np.flatnonzero(self.labels != IGNORED)
        return int(supervised[0]) if len(supervised) else len(self)


@attrs.frozen(kw_only=True, eq=False)
class Unit:
    """A row: its documents by name, each with its prompt, the columns that the loss asked for, and the row's number."""

    documents: Mapping[str, Passage]
    columns: Mapping[str, bool | int | float] = attrs.field(factory=dict)
    index: int | None = None
    where: str = ""  # file:line it came from

    @classmethod
    def of_example(cls, example: TokenExample) -> Unit:
        """Return the unit that a token example is."""
        documents = {
            name: Passage(input_ids=one.input_ids, labels=one.labels) for name, one in example.by_name().items()
        }
        return cls(documents=documents, columns=example.columns, index=example.index, where=example.where)

    def with_document(self, name: str, passage: Passage) -> Unit:
        """Return the unit with one more document; `part-invalid` where it has one of that name."""
        if name in self.documents:
            raise LuthierError("part-invalid", f"the unit has a document {name!r} already", where="loss")
        return attrs.evolve(self, documents={**self.documents, name: passage})
