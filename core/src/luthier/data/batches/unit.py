"""A unit: a row as `Loss.arrange` sees it, with its documents by name. It is never divided between batches."""

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
        """Return the tokens before the first supervised one."""
        return self.cut(0, self._first)

    @property
    def answer(self) -> Passage:
        """Return the tokens from the first supervised one on."""
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
    where: str = ""  # file:line of the row

    @classmethod
    def of_example(cls, example: TokenExample) -> Unit:
        """Return the unit of a token example."""
        documents = {
            name: Passage(input_ids=one.input_ids, labels=one.labels) for name, one in example.by_name().items()
        }
        return cls(documents=documents, columns=example.columns, index=example.index, where=example.where)

    def with_document(self, name: str, passage: Passage) -> Unit:
        """Return the unit with one more document. Raises `part-invalid` if it has one with that name."""
        if name in self.documents:
            raise LuthierError("part-invalid", f"the unit has a document {name!r} already", where="loss")
        return attrs.evolve(self, documents={**self.documents, name: passage})
