"""What rows become: token examples, preference pairs, and compact sets of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

IGNORED = -100


@attrs.frozen(kw_only=True, eq=False)
class TokenExample:
    """One document: `labels` are unshifted, IGNORED where not supervised."""

    input_ids: NDArray[np.int32]  # [L]
    labels: NDArray[np.int32]  # [L]
    weight: float = 1.0
    where: str = ""  # file:line it came from

    @property
    def num_supervised(self) -> int:
        """Labels that can be predicted: the first token of a document never can."""
        return int((self.labels[1:] != IGNORED).sum())


@attrs.frozen(kw_only=True, eq=False)
class TokenDataset(Sequence[TokenExample]):
    """Token examples in three flat arrays, so that a million rows are three allocations."""

    input_ids: NDArray[np.int32]  # [all tokens]
    labels: NDArray[np.int32]  # [all tokens]
    starts: NDArray[np.int64]  # [N+1]
    weights: NDArray[np.float32]  # [N]
    where: tuple[str, ...] = ()

    @classmethod
    def of(cls, examples: Sequence[TokenExample]) -> TokenDataset:
        empty = np.zeros(0, np.int32)
        return cls(
            input_ids=np.concatenate([empty, *(e.input_ids for e in examples)]).astype(np.int32),
            labels=np.concatenate([empty, *(e.labels for e in examples)]).astype(np.int32),
            starts=np.cumsum([0, *(len(e.input_ids) for e in examples)], dtype=np.int64),
            weights=np.array([e.weight for e in examples], np.float32),
            where=tuple(e.where for e in examples),
        )

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: Any) -> TokenExample:
        span = slice(self.starts[index], self.starts[index + 1])
        where = self.where[index] if self.where else ""
        return TokenExample(
            input_ids=self.input_ids[span], labels=self.labels[span], weight=float(self.weights[index]), where=where
        )

    def __iter__(self) -> Iterator[TokenExample]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @property
    def num_supervised(self) -> NDArray[np.int64]:
        """[N]: the labels of each example that can be predicted."""
        counted = self.labels != IGNORED
        counted[self.starts[:-1][self.lengths > 0]] = False
        total = np.concatenate([[0], np.cumsum(counted)])
        return total[self.starts[1:]] - total[self.starts[:-1]]

    @property
    def fingerprint(self) -> str:
        """A hash of every token, label, length and weight, in order."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.labels, self.starts, self.weights):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


@attrs.frozen(kw_only=True)
class PreferenceExample:
    """Two answers to one prompt, as conversations; tokenised and trained by preference losses."""

    prompt: list[dict[str, Any]] | str
    chosen: list[dict[str, Any]] | str
    rejected: list[dict[str, Any]] | str
    where: str = ""
