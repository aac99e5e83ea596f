"""Spread: one step over the ranks of a world: what the loop calls, and which micro-batch reduces the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import attrs
import torch
from torch import Tensor, nn

from luthier.engine.batch import Batch
from luthier.engine.parallel.world import World
from luthier.errors import LuthierError

Strategy = Literal["alone", "ddp", "fsdp"]


@attrs.frozen(kw_only=True, eq=False)
class Spread:
    """`module` is `Step` as the training step calls it: itself, wrapped by DDP, or sharded by FSDP2.

    Gradients come out summed over the ranks. Every rank has the same number of micro-batches, and every one of them
    takes part in every collective.
    """

    module: nn.Module
    world: World = attrs.field(factory=World)
    strategy: Strategy = "alone"
    finish: Callable[[], object] | None = None  # adds the gradients where the module itself does not

    @contextmanager
    def turn(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; DDP reduces in the last one's backward alone.

        FSDP2 reduces in each: gradients that wait would need the room of the whole model on every rank.
        """
        if self.strategy == "ddp" and self.finish is None and not last:
            with self.module.no_sync():  # type: ignore[operator]
                yield
        else:
            yield
            if last and self.finish is not None:
                self.finish()

    def number(self, micro_batch: int) -> int:
        """The micro-batch's number in the whole global batch, which its random state is drawn from."""
        return micro_batch * self.world.size + self.world.rank

    def backward(self, objective: Tensor | None, batch: Batch) -> None:
        """Add this micro-batch's gradients; an idle one's are zeros. None, on every rank alike: there is nothing.

        Raises `part-unsupported` where the others would wait for a gradient that this rank has not.
        """
        if objective is None:
            return
        if objective.requires_grad:
            (objective * 0.0 if batch.idle else objective).backward()
        elif self.world.size > 1:
            remedy = "Let the loss depend on the policy in every micro-batch, if only times zero."
            raise LuthierError("part-unsupported", "a micro-batch of one rank has no gradient", where="loss",
                               remedy=remedy)  # fmt: skip

    def joined(self, scores: Sequence[Tensor]) -> tuple[list[slice], Tensor]:
        """Every rank's scores [D of it, ...] one after the other in the order of ranks, and where this rank's stand."""
        told = self.world.gather([[list(s.shape), s.flatten().tolist(), str(s.dtype)[6:]] for s in scores])
        whole = torch.cat([restored(*entry) for entries in told for entry in entries])
        counts = [[entry[0][0] for entry in entries] for entries in told]
        starts = [sum(map(sum, counts[: self.world.rank]))]
        for count in counts[self.world.rank]:
            starts.append(starts[-1] + count)
        own = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        return own, whole.to(next(self.module.parameters()).device)


def restored(shape: Sequence[int], values: Sequence[float], dtype: str) -> Tensor:
    """A tensor from its shape, its numbers and its dtype's name, to the bit."""
    return torch.tensor(values, dtype=getattr(torch, dtype)).reshape(tuple(shape))
