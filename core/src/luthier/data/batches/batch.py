"""The batch: documents packed into one row without padding, and how examples become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from luthier.data.examples import column_arrays

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.data.examples import TokenExample

IGNORED = -100  # the label of a position that is not supervised


@attrs.define(kw_only=True, eq=False)
class Batch:
    """A batch of T tokens in D documents that belong to U units. Labels are unshifted; only `previous` shifts.

    A unit (a row, a pair, a group of completions) is never divided between batches. On an idle batch U is 0 and
    `unit_of` is -1 everywhere.
    """

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, IGNORED where not supervised
    position_ids: Tensor  # [T] int64, from 0 in each document that continues none, else counting on
    document_starts: Tensor  # [D+1] int64 on the CPU: document d is tokens [starts[d], starts[d+1])
    token_weights: Tensor  # [T] float32
    previous: Tensor  # [T] int64: the token whose hidden state predicts label t, -1 for none
    continues: Tensor  # [D] int64 on the CPU: the document whose tokens this one follows, -1 for none
    unit_of: Tensor  # [D] int64 on the CPU: the unit that the document belongs to, -1 for none
    index: Tensor  # [U] int64 on the CPU: the row of the data that each unit is, from 0
    named: dict[str, Tensor] = attrs.field(factory=dict)  # [U] int64 on the CPU each: the document of that name, or -1
    columns: dict[str, Tensor] = attrs.field(factory=dict)  # [U] each: labels, margins and the like, by column
    where: tuple[str, ...] = ()  # [D] file:line of each document, if it is known
    idle: bool = False  # a rank's turn without work: it takes part in every collective and counts as nothing
    embeddings: Tensor | None = None  # [T, H] that the body reads instead of input_ids, in a prepared batch
    origin: Tensor | None = (
        None  # [T] int64: each token's place in the loss's batch, -1 for a virtual one; None: its own
    )

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
        """Return [S] int64, the positions that have a label and a token before them."""
        return self.supervised_by(self.labels)

    def supervised_by(self, labels: Tensor) -> Tensor:
        """Return [S] int64, the positions at which `labels` [T] has a label and that have a token before them."""
        return ((labels != IGNORED) & (self.previous >= 0)).nonzero().squeeze(1)

    @property
    def lengths(self) -> Tensor:
        """Return [D] int64 on the CPU, the tokens of each document."""
        return self.document_starts.diff()

    @property
    def num_units(self) -> int:
        return self.index.shape[0]

    def documents(self, name: str) -> Tensor:
        """Return [U] int64 on the CPU: each unit's document of that name ("chosen", "text", ...), -1 for none."""
        return self.named[name] if name in self.named else self.index.new_full((self.num_units,), -1)

    @property
    def pairs(self) -> Tensor:
        """Return [P, 2] int64 on the CPU: the chosen and the rejected document of each unit that has both."""
        import torch

        both = torch.stack([self.documents("chosen"), self.documents("rejected")], dim=1)
        return both[(both >= 0).all(dim=1)]

    def document_ids(self) -> Tensor:
        """Return [T] int64, the document of each token."""
        import torch

        lengths = self.lengths.to(self.device)
        return torch.arange(self.num_documents, device=self.device).repeat_interleave(lengths)

    def sum_by_document(self, values: Tensor) -> Tensor:
        """Return the sum of `values` [T, ...] over each document, [D, ...]."""
        total = values.new_zeros((self.num_documents, *values.shape[1:]))
        return total.index_add(0, self.document_ids(), values)

    def insert_virtual(self, count: int) -> Batch:
        """Return a batch with `count` virtual tokens before each document that continues none, and with its `origin`.

        Virtual tokens have id 0 and no label; the positions of real tokens follow on them. An adapter adds the
        `embeddings`.
        """
        import torch

        added = torch.where(self.continues < 0, count, 0).cumsum(0)  # [D] up to and including each document
        places = torch.arange(self.num_tokens, device=self.device) + added.to(self.device)[self.document_ids()]
        total = self.num_tokens + int(added[-1])
        starts = self.document_starts + torch.nn.functional.pad(added, (1, 0))
        origin = places.new_full((total,), -1).index_copy(0, places, torch.arange(self.num_tokens, device=self.device))
        lengths = starts.diff().to(self.device)
        within = torch.arange(total, device=self.device) - starts[:-1].to(self.device).repeat_interleave(lengths)
        return attrs.evolve(
            self,
            input_ids=places.new_zeros(total).index_copy(0, places, self.input_ids),
            labels=places.new_full((total,), IGNORED).index_copy(0, places, self.labels),
            position_ids=within.index_copy(0, places, self.position_ids + count),
            document_starts=starts,
            token_weights=self.token_weights.new_zeros(total).index_copy(0, places, self.token_weights),
            previous=places.new_full((total,), -1).index_copy(
                0, places, torch.where(self.previous >= 0, places[self.previous], -1)
            ),
            origin=origin,
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its per-token tensors on `device`. Document tables stay on the CPU."""
        names = ("input_ids", "labels", "position_ids", "token_weights", "previous")
        pinned = str(device).startswith("cuda")  # a copy from pinned memory overlaps with computing
        own = {name: getattr(self, name) for name in names}
        own = {name: value.pin_memory() if pinned and value.is_cpu else value for name, value in own.items()}
        moved = {name: value.to(device, non_blocking=True) for name, value in own.items()}
        columns = {name: values.to(device) for name, values in self.columns.items()}
        return attrs.evolve(self, **moved, columns=columns)


def make_idle_batch(example: TokenExample) -> Batch:
    """Return the batch of a rank without work: two tokens that the model knows."""
    short = example.input_ids[:2]
    alone = attrs.evolve(example, input_ids=short, labels=short, documents=None, names=(), continues=())
    batch = collate_examples([alone])
    nothing = batch.index[:0]
    unit_of = batch.unit_of.new_full((batch.num_documents,), -1)
    columns = {name: values[:0] for name, values in batch.columns.items()}
    return attrs.evolve(batch, where=(), idle=True, unit_of=unit_of, index=nothing, named={}, columns=columns)


def collate_examples(examples: Sequence[TokenExample]) -> Batch:
    """Pack token examples, each one unit, in order into one row.

    The first label of a document that continues none is never supervised.
    """
    import torch

    lengths = [len(e.input_ids) for e in examples]
    begins, total = np.cumsum([0, *lengths[:-1]]), sum(lengths)
    starts = np.concatenate([*(e.starts + at for e, at in zip(examples, begins.tolist(), strict=True)), [total]])
    positions = np.arange(total) - np.repeat(starts[:-1], np.diff(starts))
    labels = np.concatenate([e.labels for e in examples]).astype(np.int64)
    labels[np.concatenate([e.heads + at for e, at in zip(examples, begins.tolist(), strict=True)])] = IGNORED
    weights = np.array([e.weight for e in examples], np.float32)
    batch = Batch(
        input_ids=torch.from_numpy(np.concatenate([e.input_ids for e in examples]).astype(np.int64)),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        document_starts=torch.from_numpy(starts),
        token_weights=torch.from_numpy(np.repeat(weights, lengths)),
        previous=torch.from_numpy(np.where(positions > 0, np.arange(total) - 1, -1)),
        continues=torch.full((len(starts) - 1,), -1, dtype=torch.int64),
        unit_of=torch.from_numpy(np.repeat(np.arange(len(examples)), [len(e.starts) for e in examples])),
        index=torch.tensor([i if e.index is None else e.index for i, e in enumerate(examples)], dtype=torch.int64),
        named=_named(examples),
        columns={name: torch.from_numpy(values) for name, values in column_arrays(examples).items()},
        where=tuple(e.where for e in examples for _ in e.starts),
    )
    return continue_documents(batch, _links(examples)) if any(e.continues for e in examples) else batch


def _links(examples: Sequence[TokenExample]) -> list[int]:
    """Return the document of the batch that each document follows, -1 for none."""
    links: list[int] = []
    for example in examples:
        first = len(links)
        own = example.continues or (-1,) * len(example.starts)
        links += [first + link if link >= 0 else -1 for link in own]
    return links


def chain_of(links: Sequence[int], document: int) -> list[int]:
    """Return the chain of documents that a document follows, first one first, and itself. links[d] is -1 for none."""
    chain = [document]
    while links[chain[0]] >= 0:
        chain.insert(0, links[chain[0]])
    return chain


def continue_documents(batch: Batch, links: Sequence[int]) -> Batch:
    """Return the batch with document d following document links[d], -1 for none. None of them may be empty."""
    import torch

    lengths, starts = batch.lengths.tolist(), batch.document_starts.tolist()
    before = [sum(lengths[d] for d in chain_of(links, document)[:-1]) for document in range(len(links))]
    within = torch.arange(batch.num_tokens) - batch.document_starts[:-1].repeat_interleave(batch.lengths)
    positions = within + torch.tensor(before).repeat_interleave(batch.lengths)
    previous = torch.where(within > 0, torch.arange(batch.num_tokens) - 1, -1)
    for document, link in enumerate(links):
        previous[starts[document]] = starts[link + 1] - 1 if link >= 0 else -1
    return attrs.evolve(
        batch,
        position_ids=positions.to(batch.device),
        previous=previous.to(batch.device),
        continues=torch.tensor(links),
    )


def _named(examples: Sequence[TokenExample]) -> dict[str, Tensor]:
    """Return [U] for each name of a document: its number in the batch, -1 if a unit has none of that name."""
    import torch

    firsts = np.cumsum([0, *(len(e.starts) for e in examples[:-1])]).tolist()
    numbers = [{name: first + at for name, at in e.named.items()} for e, first in zip(examples, firsts, strict=True)]
    names = dict.fromkeys(name for own in numbers for name in own)
    return {name: torch.tensor([own.get(name, -1) for own in numbers], dtype=torch.int64) for name in names}
