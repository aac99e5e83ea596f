"""Units drawn for a loss: the documents, labels and columns that its record declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from luthier.testing.strategies import Document, drawn_documents

if TYPE_CHECKING:
    from luthier.data.batches.batch import Batch
    from luthier.data.examples import TokenExample
    from luthier.testing.laws import Subject

VALUES: Final[Mapping[str, SearchStrategy[Any]]] = {
    "bool": st.booleans(),
    "int": st.integers(0, 5),
    "float": st.sampled_from((0.0, 0.25, 0.5, 1.0, 2.0)),
}
NAMES: Final = {"tokens": ("text",), "unpaired": ("text",), "preference": ("chosen", "rejected"), "documents": ()}


@attrs.frozen(kw_only=True)
class DrawnUnit:
    """One unit: its documents by name, the row's columns, and the weight of its example."""

    documents: Mapping[str, Document]
    columns: Mapping[str, bool | int | float] = attrs.field(factory=dict)
    weight: float = 1.0


def drawn_units_of(weights: Sequence[float] = (1.0,)) -> Callable[[Subject], SearchStrategy[DrawnUnit]]:
    """Return a function that gives a strategy of one unit for the loss under test."""

    def strategy(subject: Subject) -> SearchStrategy[DrawnUnit]:
        record: Any = subject.record
        names = dict.fromkeys((*NAMES[record.data], *record.documents))
        columns = {"label": "bool", **record.columns} if record.data == "unpaired" else dict(record.columns)
        return st.builds(
            DrawnUnit,
            documents=st.fixed_dictionaries({name: drawn_documents() for name in names}),
            columns=st.fixed_dictionaries({name: VALUES[kind] for name, kind in columns.items()}),
            weight=st.sampled_from(tuple(weights)),
        )

    return strategy


def unit_packs(weights: Sequence[float] = (1.0, 0.5, 2.0)) -> Callable[[Subject], SearchStrategy[list[DrawnUnit]]]:
    """Return a function that gives a strategy of one to three units that are packed into one batch."""
    return lambda subject: st.lists(drawn_units_of(weights)(subject), min_size=1, max_size=3)


def even_units(subject: Subject) -> SearchStrategy[list[DrawnUnit]]:
    """Return a strategy of units whose documents have the same length and the same place of the answer."""

    def like(unit: DrawnUnit) -> DrawnUnit:
        first = next(iter(unit.documents.values()))
        supervised = (False, *[True] * (len(first.ids) - 1))
        resized = {
            name: attrs.evolve(d, ids=(d.ids * len(first.ids))[: len(first.ids)], supervised=supervised)
            for name, d in unit.documents.items()
        }
        return attrs.evolve(unit, documents=resized)

    return st.lists(drawn_units_of()(subject).map(like), min_size=1, max_size=3)


def lay_out_units(loss: Any, drawn: Sequence[DrawnUnit]) -> list[TokenExample]:
    """Return the units of one global batch as a run packs them, with the documents that the loss's `arrange` adds."""
    from luthier.plugins.completion import has_default

    examples = [_example(unit, index) for index, unit in enumerate(drawn)]
    if has_default(loss, "loss", "arrange"):
        return examples
    from luthier.step.losses.unit_layout import UnitLayout

    return list(UnitLayout(max_length=1 << 20, arrange=loss.arrange).lay_out(examples).examples)


def pack_examples(examples: Sequence[TokenExample]) -> Batch:
    """Return the batch of these units."""
    from luthier.data.batches.batch import collate_examples

    return collate_examples(examples)


def idle_batch(drawn: Sequence[DrawnUnit]) -> Batch:
    """Return the batch of a rank without work, in a run with such units."""
    from luthier.data.batches.batch import make_idle_batch

    return make_idle_batch(_example(drawn[0], 0))


def _example(unit: DrawnUnit, index: int) -> TokenExample:
    import numpy as np

    from luthier.data.examples import IGNORED, TokenExample

    parts = {}
    for name, document in unit.documents.items():
        ids = np.array(document.ids, np.int32)
        labels = np.where(np.array(document.supervised), ids, IGNORED).astype(np.int32)
        columns = dict(unit.columns)
        parts[name] = TokenExample(input_ids=ids, labels=labels, weight=unit.weight, columns=columns, index=index)
    return TokenExample.joined(parts)
