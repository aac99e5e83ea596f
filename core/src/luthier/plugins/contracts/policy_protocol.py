"""The contract of the policy: the model as a loss sees it, without all of its logits at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Policy(Protocol):
    """The model as a loss sees it: log-probabilities and chunks of logits. T, D, V and H are the sizes of the batch."""

    def token_logprobs(self, batch: Any, want: Sequence[str] = (), labels: Tensor | None = None) -> Any:
        """Return [T] float32: entry t is log p(labels[t]), and 0 where labels[t] is -100.

        With `want` (of "entropy", "top1"), return a pair of that tensor and a dict of [T] float32 from the same pass.
        `labels` [T] int64 scores other labels than the batch's, in the same pass of the body.
        """
        ...

    def map_logits(
        self, batch: Any, function: Callable[..., Any], *per_token: Tensor, other: Policy | None = None
    ) -> Tensor:
        """Return [T, ...]: `function(logits [C, V], labels [C], *per_token [C, ...])` over chunks of positions.

        The supervised positions are covered; all others are 0. Chunks are recomputed in the backward pass. With
        `other`, another policy, its logits [C, V] are passed as the last argument.
        """
        ...

    def states(self, batch: Any) -> Tensor:
        """Return [T, H]: the states that the head reads, from one pass of the body over this batch."""
        ...

    def head(self, states: Tensor) -> Tensor:
        """Return the logits [C, V] of states [C, H], as the model computes them (caps, scales, adapters)."""
        ...

    def hidden(self, batch: Any, layers: Sequence[int]) -> list[Tensor]:
        """Return [T, H] for each layer asked for; layer -1 is what the head reads."""
        ...

    def score(self, batch: Any) -> Tensor:
        """Return [D] float32: the output of a scalar head at each document's last token."""
        ...

    def reference(self) -> Policy:
        """Return the policy that the recipe's `reference` names, without gradient."""
        ...

    def teacher(self) -> Policy:
        """Return the teacher that the recipe names, without gradient."""
        ...
