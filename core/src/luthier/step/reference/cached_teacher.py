"""The cached teacher: its most likely tokens at every supervised one, computed once before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.step.reference.cached_reference import CachedReference, document_keys

if TYPE_CHECKING:
    from luthier.data.batches.batch import Batch
    from luthier.model.policy import ModelPolicy

CACHE: Final = "teacher_cache"


class CachedTeacher(CachedReference):
    """Keeps the `Policy` protocol as far as `map_logits` of the policy that trains asks its `other`.

    Of each supervised token the `count` largest logits are kept with their places, and what the others sum up to at
    `temperature`. Its logits have that sum evenly in all other places, so that a loss with such `teacher_reads` has
    the numbers of the live teacher.
    """

    option: ClassVar[str] = CACHE

    def __init__(
        self, identity: Mapping[str, Any], reads: tuple[int, float], vocabulary: int, *, blank: bool = False
    ) -> None:
        """Make an empty cache for a teacher of so many tokens; `blank`: it stays empty, in a rehearsal."""
        super().__init__({**identity, "top_k and temperature": list(reads)}, derives=False, sharded=False)
        self.blank = blank
        self.count, self.temperature, self.vocabulary = min(reads[0], vocabulary), reads[1], vocabulary
        self.width = 2 * self.count + 1

    def live_values(self, policy: ModelPolicy, batch: Batch) -> Tensor:
        live = policy.others["teacher"].live
        return live.map_logits(batch, lambda logits, labels: keep_top(logits, self.count, self.temperature))

    def states(self, batch: Batch) -> Tensor:
        """Return [T, width]: what is kept, in the row of the token that predicts the supervised one."""
        rows = torch.zeros(batch.num_tokens, self.width, device=batch.device)
        if batch.idle or self.blank:
            return rows
        kept = [self.values.get(key) for _, key in document_keys(batch)]
        if any(values is None for values in kept):
            raise LuthierError("part-unsupported", "these documents are none of the run's rows", where=CACHE,
                               remedy=f"Set {CACHE}: false to ask the teacher about other rows.")  # fmt: skip
        found = [values.to(batch.device) for values in kept if values is not None]
        return rows.index_copy(0, batch.previous[batch.supervised], torch.cat(found)) if found else rows

    def head(self, states: Tensor) -> Tensor:
        """Return logits [C, V] of rows that `states` gave."""
        return spread_top(states, self.count, self.temperature, self.vocabulary)

    def token_logprobs(self, batch: Batch, want: Sequence[str] = (), labels: Tensor | None = None) -> Tensor:
        raise _not_kept("log-probabilities")

    def map_logits(self, batch: Batch, function: Any, *per_token: Tensor, other: Any = None) -> Tensor:
        raise _not_kept("a function of its logits alone")

    def hidden(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        raise _not_kept("hidden states")

    def attention_inputs(self, batch: Batch, layers: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        raise _not_kept("queries, keys and values")


def keep_top(logits: Tensor, count: int, temperature: float) -> Tensor:
    """Return [C, 2 * count + 1] of logits [C, V]: the largest log-probabilities, their places, and the others' sum.

    The log-probabilities are those at the temperature. Places are numbers of float32, which are exact below 2^24.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = (logits / temperature).log_softmax(-1)
    top = logprobs.topk(count, dim=-1)
    rest, lowest = logprobs.scatter(-1, top.indices, -torch.inf), torch.finfo(logprobs.dtype).min / 2
    peak = rest.amax(-1, keepdim=True).clamp_min(lowest)
    # `logsumexp` would make one more tensor as wide as the vocabulary
    others = rest.sub_(peak).exp_().sum(-1, keepdim=True).log_().add_(peak).clamp_min_(lowest)
    return torch.cat([top.values, top.indices.to(logprobs), others], dim=-1)


def spread_top(kept: Tensor, count: int, temperature: float, vocabulary: int) -> Tensor:
    """Return logits [C, V] of what `keep_top` gave; the sum of the others is divided evenly among their places."""
    values, places, others = kept.split([count, count, 1], dim=-1)
    share = others - math.log(max(vocabulary - count, 1))
    return temperature * share.expand(-1, vocabulary).scatter(-1, places.long(), values)


def _not_kept(asked: str) -> LuthierError:
    problem = f"the loss asks the teacher for {asked}, and only its most likely tokens are kept"
    return LuthierError("recipe-conflict", problem, where=CACHE, remedy=f"Set {CACHE}: false.")
