"""The protocol of the policy: the model as a loss sees it, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Policy(Protocol):
    """The model as a loss sees it. Shapes: T tokens and D documents of the batch, V vocabulary, H hidden size.

    The body of the model runs once for a batch, however many of these methods a loss calls.
    """

    def token_logprobs(self, batch: Any, want: Sequence[str] = (), labels: Tensor | None = None) -> Any:
        """Return the log-probability of each label, [T] float32, and 0 where the label is -100.

        With `want`, a sequence of "entropy" and "top1", it returns a pair: the log-probabilities, and a dict of the
        wanted statistics, [T] float32 each. `labels` [T] int64 scores other labels than those of the batch.
        """
        ...

    def map_logits(
        self, batch: Any, function: Callable[..., Any], *per_token: Tensor, other: Policy | None = None
    ) -> Tensor:
        """Apply a function to the logits of the supervised positions, in chunks of C, and return [T, ...].

        `function(logits [C, V], labels [C], *per_token [C, ...])` returns [C, ...]. Positions without supervision are
        0 in the result. The logits of a chunk are freed, and computed again in the backward pass. With `other`, another
        policy, the function gets that policy's logits [C, V] as its last argument.
        """
        ...

    def states(self, batch: Any) -> Tensor:
        """Return the last hidden states [T, H], which the head reads."""
        ...

    def head(self, states: Tensor) -> Tensor:
        """Return the logits [C, V] of hidden states [C, H], with the model's caps and scales, and with its adapters."""
        ...

    def hidden(self, batch: Any, layers: Sequence[int]) -> list[Tensor]:
        """Return the hidden states [T, H] after each of `layers`; -1 is what the head reads."""
        ...

    def attention_inputs(self, batch: Any, layers: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the queries, keys and values with which each of `layers` attends; -1 is the last layer.

        Queries are [T, heads, d], keys [T, key-value heads, d] and values [T, key-value heads, d'], after projections,
        norms and rotary positions, with the adapter's share and without virtual tokens and prefixes. Raises
        `IndexError` for a layer that does not exist, and `part-unsupported` for one that gives none.
        """
        ...

    def score(self, batch: Any) -> Tensor:
        """Return the output of a scalar head at the last token of each document, [D] float32."""
        ...

    def reference(self) -> Policy:
        """Return the policy that the recipe's `reference` names. It computes without gradient."""
        ...

    def teacher(self) -> Policy:
        """Return the policy that the recipe's `teacher` names. It computes without gradient."""
        ...
