"""The order among the ranks of one machine, where one prepares a file that the others use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from luthier.distributed.store import _hand_over, _turns

if TYPE_CHECKING:
    from luthier.distributed.world import World


@contextmanager
def first_here(world: World) -> Iterator[None]:
    """Let one rank of each machine go first, so that the others find on disk what it has made."""
    if world.size == 1:
        yield  # takes no turn, which the other ranks would not count
        return
    turn = f"first/{next(_turns)}/{os.environ.get('GROUP_RANK', '0')}"
    leads = not world.local_rank
    if not leads:
        _hand_over(turn, leads, world.barrier)
    try:
        yield
    finally:  # if it fails, the others go on, and fail in the same way
        if leads:
            _hand_over(turn, leads, world.barrier)
