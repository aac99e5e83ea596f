"""A step spread over the ranks of a world: what the loop calls, and which micro-batch reduces the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from luthier.data.batches.batch import Batch
from luthier.distributed.world import World, lost_peers, wire_device
from luthier.errors import LuthierError

Strategy = Literal["alone", "ddp", "fsdp"]


@attrs.frozen(kw_only=True, eq=False)
class Spread:
    """`Step` as the training step calls it: `module` is the step itself, wrapped by DDP, or sharded by FSDP2.

    Gradients come out summed over the ranks. Every rank has the same number of micro-batches, and every one of them
    takes part in every collective.
    """

    module: nn.Module
    world: World = attrs.field(factory=World)
    strategy: Strategy = "alone"
    finish: Callable[[], object] | None = None  # adds the gradients over the ranks if the module itself does not

    @contextmanager
    def turn(self, last: bool) -> Iterator[None]:
        """Surround forward and backward of one micro-batch. DDP reduces gradients only in the last one's backward.

        FSDP2 reduces in each: gradients that wait would need the memory of the whole model on every rank.
        """
        if self.strategy == "ddp" and self.finish is None and not last:
            with self.module.no_sync():  # type: ignore[operator]
                yield
        else:
            yield
            if last and self.finish is not None:
                self.finish()

    def number(self, micro_batch: int) -> int:
        """Return the micro-batch's number within the global batch, from which its random state is drawn."""
        return micro_batch * self.world.size + self.world.rank

    def backward(self, objective: Tensor | None, batch: Batch) -> None:
        """Add this micro-batch's gradients; those of an idle one are zeros. An `objective` of None adds nothing on any
        rank.

        Raises `part-unsupported` if the other ranks would wait for a gradient that this rank does not have.
        """
        if objective is None:
            return
        if objective.requires_grad:
            (objective * 0.0 if batch.idle else objective).backward()
        elif self.world.size > 1:
            remedy = "Let the loss depend on the policy in every micro-batch, if only times zero."
            raise LuthierError("part-unsupported", "a micro-batch of one rank has no gradient", where="loss",
                               remedy=remedy)  # fmt: skip

    def join_rows(self, pieces: Sequence[Tensor]) -> tuple[list[slice], Tensor]:
        """Return the rows [rows, ...] of every rank in the order of ranks, and the slice of each of this rank's pieces.

        This is a collective. Pieces without rows may have any size. Raises `part-invalid` if ranks differ in row size.
        """
        full = [piece for piece in pieces if len(piece)]
        mine = torch.cat(full) if full else pieces[0]
        first, whole = (0, mine) if self.world.size == 1 else gather_rows(mine, self.world)
        places = []
        for piece in pieces:
            places.append(slice(first, first + len(piece)))
            first += len(piece)
        return places, whole


def gather_rows(mine: Tensor, world: World) -> tuple[int, Tensor]:
    """Return the index of this rank's first row among those of all ranks, and all rows, on this rank's device."""
    form: list[Any] = [list(mine.shape), str(mine.dtype)[6:]]
    gathered = world.gather(form)
    counts = [shape[0] for shape, _ in gathered]
    forms = [(tuple(shape[1:]), dtype) for shape, dtype in gathered if shape[0]]
    if not forms:
        return 0, mine
    if len(set(forms)) > 1:
        problem = "the ranks' scores differ in size or dtype"
        raise LuthierError("part-invalid", problem, where="loss", found=sorted(set(forms)))
    size, dtype = forms[0][0], getattr(torch, forms[0][1])
    filled = torch.zeros((max(counts), *size), dtype=dtype, device=wire_device(world.group))
    filled[: counts[world.rank]] = mine if counts[world.rank] else filled[:0]
    raw = filled.flatten().view(torch.uint8)
    rows = [torch.empty_like(raw) for _ in range(world.size)]
    with lost_peers():
        dist.all_gather(rows, raw, group=world.group)
    parts = [row.view(dtype).reshape(filled.shape)[:count] for row, count in zip(rows, counts, strict=True)]
    return sum(counts[: world.rank]), torch.cat(parts).to(mine.device)
