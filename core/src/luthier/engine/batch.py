"""Batch: documents packed into one padding-free row, and how examples become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.data.examples import TokenExample

IGNORED = -100  # the label of a position that is not supervised


@attrs.define(kw_only=True, eq=False)
class Batch:
    """T tokens of D documents. Labels are unshifted; only `previous` shifts."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, IGNORED where not supervised
    position_ids: Tensor  # [T] int64, from 0 in each document
    document_starts: Tensor  # [D+1] int64 on the CPU: document d is tokens [starts[d], starts[d+1])
    token_weights: Tensor  # [T] float32
    previous: Tensor  # [T] int64: the token whose hidden state predicts label t, -1 for none
    continues: Tensor  # [D] int64 on the CPU: the document whose tokens this one follows, -1 for none
    extras: dict[str, Any] = attrs.field(factory=dict)  # what the loss's data brings, such as pairs

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_documents(self) -> int:
        return self.document_starts.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def supervised(self) -> Tensor:
        """[S] int64: the positions that carry a label and have a token before them."""
        return ((self.labels != IGNORED) & (self.previous >= 0)).nonzero().squeeze(1)

    @property
    def lengths(self) -> Tensor:
        """[D] int64 on the CPU."""
        return self.document_starts.diff()

    def document_ids(self) -> Tensor:
        """[T] int64: the document of each token."""
        import torch

        lengths = self.lengths.to(self.device)
        return torch.arange(self.num_documents, device=self.device).repeat_interleave(lengths)

    def sum_by_document(self, values: Tensor) -> Tensor:
        """[T, ...] to [D, ...]."""
        total = values.new_zeros((self.num_documents, *values.shape[1:]))
        return total.index_add(0, self.document_ids(), values)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its per-token tensors on `device`; document tables stay on the CPU."""
        names = ("input_ids", "labels", "position_ids", "token_weights", "previous")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        extras = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.extras.items()}
        return attrs.evolve(self, **moved, extras=extras)


def collate(examples: Sequence[TokenExample]) -> Batch:
    """Pack token examples, in order, into one row. A document's first label is never supervised."""
    import torch

    lengths = torch.tensor([len(e.input_ids) for e in examples])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(starts[-1])
    first = starts[:-1].repeat_interleave(lengths)  # [T] the first token of each token's document
    positions = torch.arange(total) - first
    labels = torch.cat([torch.as_tensor(e.labels, dtype=torch.int64) for e in examples])
    labels[starts[:-1]] = IGNORED
    weights = torch.tensor([e.weight for e in examples], dtype=torch.float32)
    return Batch(
        input_ids=torch.cat([torch.as_tensor(e.input_ids, dtype=torch.int64) for e in examples]),
        labels=labels,
        position_ids=positions,
        document_starts=starts,
        token_weights=weights.repeat_interleave(lengths),
        previous=torch.where(positions > 0, torch.arange(total) - 1, -1),
        continues=torch.full((len(examples),), -1, dtype=torch.int64),
    )
