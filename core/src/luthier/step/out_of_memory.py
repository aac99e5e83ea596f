"""Recovery: a step that ran out of memory begins again with smaller micro-batches and the same global batch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import torch

from luthier.errors import LuthierError
from luthier.hardware.free_memory import measure_capacity
from luthier.logs import get_logger
from luthier.sizes import size_text
from luthier.step.setup import Attempt

if TYPE_CHECKING:
    from luthier.step.setup import Setup

log = get_logger()
Result = TypeVar("Result")
TRIES: Final = 3  # attempts with one example in the largest micro-batch
SAYINGS: Final = (  # parts of messages of RuntimeErrors that mean exhausted memory
    "out of memory",  # CUDA, HIP, MPS
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",
    "ALLOC_FAILED",  # cuBLAS, cuDNN
)


class Elsewhere(Exception):
    """Another rank ran out of memory in this attempt."""


def is_exhausted(error: BaseException) -> bool:
    """Return True if an error says that the device's or the machine's memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in SAYINGS)


def agree_memory(setup: Setup, *, last: bool) -> None:
    """Collective: raise `Elsewhere` where any rank has run out of memory; before what all ranks must do together."""
    if setup.world.size > 1:
        if setup.world.any(False):
            raise Elsewhere
        setup.attempt.closed = last


def fit_memory(setup: Setup, lengths: Sequence[int], work: Callable[[], Result], *, agrees: bool = True) -> Result:
    """Return what `work` gives; where memory runs out in it, it is called again, after the token limit was halved.

    `lengths` are those of the examples that `work` packs. Once every micro-batch is as small as the longest of them,
    there are three more tries, and then `memory-exhausted`; at once where the recipe says `oom_recovery: false`. The
    smaller limit holds for the rest of the run. Sums and weights are those of the whole step, so that its gradient
    does not depend on how often it began. Several ranks begin again together if `work` calls `agree`.
    """
    tries = 0
    while True:
        setup.attempt = Attempt(closed=not agrees)
        result, problem = _attempted(setup, work)
        if problem is None:
            return result  # type: ignore[return-value]
        most, longest = _fullest(setup, lengths), max(lengths)
        tries += most <= longest
        if tries > TRIES or not _may_retry(setup):
            raise exhausted(setup, most, tries, problem)
        limit = max(longest, most // 2)
        setup.packing = attrs.evolve(setup.packing, max_tokens=limit)
        log.warning("out of memory: the step begins again", tokens=most, limit=limit,
                    global_batch="unchanged", cause=problem)  # fmt: skip


def lowered_limit(setup: Setup) -> int | None:
    """Return the token limit that was learnt, for the checkpoint; None if none was."""
    limit = setup.packing.max_tokens
    return limit if limit < setup.recipe.max_tokens_per_device else None


def hold_limit(setup: Setup, limit: int | None) -> None:
    """Go on with the limit that a checkpoint kept."""
    if limit is not None and limit < setup.packing.max_tokens:
        setup.packing = attrs.evolve(setup.packing, max_tokens=limit)
        log.info("micro-batches stay small, as memory ran out before", limit=limit)


def exhausted(setup: Setup, tokens: int, tries: int, problem: str) -> LuthierError:
    """Return the error for exhausted memory, with its numbers."""
    room = measure_capacity(setup.device)
    tried = f", {tries - 1} times again" if tries > 1 else ""
    numbers = f"{size_text(room.free)} of {size_text(room.total)} on {room.device} are free now"
    return LuthierError(
        "memory-exhausted",
        f"a micro-batch of {tokens:,} tokens does not fit{tried}: {problem}; {numbers}",
        remedy=f"Try {', '.join(_remedies(setup))}, or a smaller data.max_length.",
    )


def _attempted(setup: Setup, work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return what `work` gives, or else why memory ran out, with nothing left of it; on every rank alike."""
    try:
        return work(), None
    except Elsewhere:
        problem = "on another rank"
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        problem = next(iter(str(error).splitlines()), "") or type(error).__name__
        if setup.world.size > 1 and not _alone(setup):
            setup.world.any(True)
    setup.optimizer.zero_grad(set_to_none=True)
    gc.collect()  # only here, because the error and its frames are gone now
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    return None, problem


def _may_retry(setup: Setup) -> bool:
    return setup.recipe.oom_recovery and not (setup.world.size > 1 and _alone(setup))


def _alone(setup: Setup) -> bool:
    """Return True if the other ranks are inside a collective that waits for this one."""
    return setup.attempt.closed or setup.spread.strategy == "fsdp"


def _fullest(setup: Setup, lengths: Sequence[int]) -> int:
    """Tokens of the largest micro-batch over all ranks."""
    return max(sum(lengths[i] for i in own) for bins in setup.packing.spread(lengths) for own in bins)


def _remedies(setup: Setup) -> list[str]:
    recipe = setup.recipe
    remedies = [] if recipe.gradient_checkpointing else ["gradient_checkpointing: true"]
    if next(setup.model.parameters()).dtype in (torch.float32, torch.float64):
        remedies.append("model.dtype: bfloat16")
    return [*remedies, "an adapter that trains fewer weights"]
