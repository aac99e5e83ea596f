"""The report of a preparation: rows, examples, drops by reason, tokens and lengths, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.batches.shared_prompts import saved_by_unit
from luthier.data.examples import TokenDataset
from luthier.data.formats.bad_rows import TOLD, Fault, count_faults

PERCENTILES: Final = (0, 25, 50, 75, 90, 95, 99, 100)
BINS: Final = 12
COUNTED: Final = ("drops", "changes", "unrendered")


@attrs.define(kw_only=True)
class Report:
    """The report on the rows of one set. `drops` counts rows, or parts of split rows, by reason."""

    format: str = ""
    rows: int = 0
    examples: int = 0
    drops: Counter[str] = attrs.field(factory=Counter)
    # rows truncated, split, or turned into one example for each answer
    changes: Counter[str] = attrs.field(factory=Counter)
    unrendered: Counter[str] = attrs.field(factory=Counter)  # messages, tools and thoughts that are in no text, by role
    tokens: int = 0
    supervised_tokens: int = 0
    lengths: dict[str, int] = attrs.field(factory=dict)  # tokens of an example, by percentile
    # lengths of the documents of units, by document name
    document_lengths: dict[str, dict[str, int]] = attrs.field(factory=dict)
    shared_tokens: int = 0  # tokens that are computed once, because documents of a unit share their prompt
    # (shortest, longest, number of examples) of each bar
    histogram: list[tuple[int, int, int]] = attrs.field(factory=list)
    warnings: list[str] = attrs.field(factory=list)
    bad_rows: list[str] = attrs.field(factory=list)  # the first rows that were dropped, each with its place
    # if there are several: rows of each, and how many come in an epoch
    sources: list[dict[str, Any]] = attrs.field(factory=list)
    validation: Report | None = None

    @property
    def dropped(self) -> int:
        return sum(self.drops.values())

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def add_faults(self, faults: Sequence[Fault]) -> None:
        """Count bad rows that were dropped, and store the first ones."""
        self.drops.update(count_faults(faults))
        self.bad_rows += [fault.line for fault in faults[: TOLD - len(self.bad_rows)]]

    def measure(self, dataset: TokenDataset) -> None:
        """Fill in tokens, percentiles and the histogram from the examples."""
        lengths, supervised = dataset.lengths, dataset.num_supervised
        self.examples, self.tokens, self.supervised_tokens = len(lengths), int(lengths.sum()), int(supervised.sum())
        if len(lengths):
            self.lengths, self.histogram = _percentiles(lengths), _histogram(lengths)
        if len(lengths) and dataset.names:
            self.document_lengths = {name: _percentiles(own) for name, own in dataset.document_lengths.items()}
            self.shared_tokens = int(saved_by_unit(dataset).sum())

    def to_dict(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in attrs.fields(Report)}
        plain |= {name: dict(getattr(self, name)) for name in COUNTED} | {"dropped": self.dropped}
        plain |= {"supervised_share": self.supervised_share, "histogram": [list(bar) for bar in self.histogram]}
        return plain | {"validation": self.validation and self.validation.to_dict()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Report:
        """Return the report that `to_dict` turned into `plain`."""
        fields = {field.name: plain[field.name] for field in attrs.fields(cls)}
        fields |= {name: Counter(fields[name]) for name in COUNTED}
        fields["histogram"] = [(low, high, count) for low, high, count in fields["histogram"]]
        fields["validation"] = fields["validation"] and cls.from_dict(fields["validation"])
        return cls(**fields)


def _percentiles(lengths: NDArray[np.int64]) -> dict[str, int]:
    values = np.percentile(lengths, PERCENTILES, method="nearest").tolist()
    return {f"p{p}": int(v) for p, v in zip(PERCENTILES, values, strict=True)}


def _histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return up to 12 bars of equal width over whole numbers of tokens."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // BINS))
    counts = np.bincount((lengths - low) // width)
    return [(low + i * width, low + (i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]
