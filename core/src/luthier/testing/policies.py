"""Policies over a table of logits: what a loss sees of a model, exact and in any range."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from luthier.data.batches.batch import Batch, chain_of
from luthier.errors import LuthierError

CHUNK: Final = 4  # positions per call of map_logits: few, to expose a function that needs all at once
WIDTH: Final = 8


class TablePolicy:
    """A policy over `logits [T, V]`, in which row t is the head's output at token t.

    Results have the table's dtype (float64 for exact gradients). `reference` and `teacher` are other tables, each row
    computed from the same row, so that a part of the batch has a part of them. `asked` lists each [T] that
    `token_logprobs` returned, with its gradient; `sources` are the rows that predict labels requested by `labels=`, and
    those that attention reads.
    `others` says which of "reference" and "teacher" exist.
    """

    def __init__(self, logits: Tensor, others: Collection[str] = ("reference", "teacher")) -> None:
        self.logits, self.others = logits, others
        self.asked: list[Tensor] = []
        self.sources: set[int] = set()

    def token_logprobs(self, batch: Batch, want: Sequence[str] = (), labels: Tensor | None = None) -> Any:
        unknown = set(want) - {"entropy", "top1"}
        if unknown:
            raise LuthierError("part-invalid", f"token_logprobs cannot give {', '.join(sorted(unknown))}")
        asked = batch.labels if labels is None else labels
        positions = batch.supervised_by(asked)
        if labels is not None:
            self.sources.update(batch.previous[positions].tolist())
        rows, labels = self.logits[batch.previous[positions]], asked[positions]
        values = rows.log_softmax(-1)
        logprobs = _scattered(values.gather(-1, labels[:, None]).squeeze(-1), positions, batch)
        if logprobs.requires_grad:
            logprobs.retain_grad()
        self.asked.append(logprobs)
        also = {
            "entropy": _scattered(-(values.exp() * values).sum(-1), positions, batch),
            "top1": _scattered((rows.argmax(-1) == labels).to(rows.dtype), positions, batch),
        }
        return (logprobs, {name: also[name] for name in want}) if want else logprobs

    def map_logits(
        self, batch: Batch, function: Callable[..., Tensor], *per_token: Tensor, other: Any = None
    ) -> Tensor:
        positions = batch.supervised
        inputs = [self._rows(batch), batch.labels[positions], *(p[positions] for p in per_token)]
        if other is not None:
            inputs.append(other.head(other.states(batch)[batch.previous[positions]]))
        spans = [slice(s, s + CHUNK) for s in range(0, max(len(positions), 1), CHUNK)]
        return _scattered(torch.cat([function(*(i[span] for i in inputs)) for span in spans]), positions, batch)

    def states(self, batch: Batch) -> Tensor:
        """Return [T, V], because the head of this policy changes nothing."""
        return self.logits

    def head(self, states: Tensor) -> Tensor:
        return states

    def hidden(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        return [self.logits @ self._projection(layer) for layer in layers]

    def attention_inputs(self, batch: Batch, layers: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return queries [T, 4, 2], keys [T, 2, 2] and values [T, 2, 2] of each layer.

        All tokens before one that predicts a label become `sources`, because attention reads their keys and values.
        """
        self.sources.update(_attended_tokens(batch))
        return [self._attention_inputs(layer) for layer in layers]

    def score(self, batch: Batch) -> Tensor:
        return self.logits[batch.document_starts[1:] - 1, 0]

    def reference(self) -> TablePolicy:
        self._require("reference")
        return TablePolicy(self.logits.detach().roll(1, -1))

    def teacher(self) -> TablePolicy:
        self._require("teacher")
        return TablePolicy(self.logits.detach().flip(-1) / 2)

    def _require(self, name: str) -> None:
        if name not in self.others:
            remedy = f"Let the record say needs={{'{name}'}}."
            raise LuthierError("part-invalid", f"it uses a {name}, but its record does not need one", remedy=remedy)

    def _rows(self, batch: Batch) -> Tensor:
        """Return [S, V], the logits that predict each supervised label."""
        return self.logits[batch.previous[batch.supervised]]

    def _attention_inputs(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (self.logits @ self._projection(100 * kind + layer) for kind in (1, 2, 3))
        return query.unflatten(-1, (4, 2)), key[:, :4].unflatten(-1, (2, 2)), value[:, :4].unflatten(-1, (2, 2))

    def _projection(self, layer: int) -> Tensor:
        """Return a fixed random matrix [V, WIDTH] for a layer."""
        random = torch.Generator().manual_seed(1000 + layer)
        return torch.randn(self.logits.shape[-1], WIDTH, generator=random, dtype=self.logits.dtype)


def _attended_tokens(batch: Batch) -> set[int]:
    """Return the tokens that those which predict a label attend to."""
    starts, links = batch.document_starts.tolist(), batch.continues.tolist()
    owners = batch.document_ids().tolist()
    attended: set[int] = set()
    for source in batch.previous[batch.supervised].tolist():
        *before, own = chain_of(links, owners[source])
        attended.update(range(starts[own], source + 1))
        for document in before:
            attended.update(range(starts[document], starts[document + 1]))
    return attended


def _scattered(values: Tensor, positions: Tensor, batch: Batch) -> Tensor:
    """Spread values [S, ...] to [T, ...], with 0 elsewhere."""
    return values.new_zeros((batch.num_tokens, *values.shape[1:])).index_copy(0, positions, values)


def random_table(tokens: int, vocabulary: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return logits [tokens, vocabulary] of a usual size."""
    random = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(tokens, vocabulary, generator=random, dtype=dtype)
