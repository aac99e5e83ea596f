"""Notes that processes leave for each other in the store of their process group, without a collective."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import torch.distributed as dist

FOREVER: Final = timedelta(days=365)  # if the other process fails, the launcher ends the one that waits
_stores: list[dist.Store] = []
_turns = itertools.count()


def keep_store(store: dist.Store) -> None:
    """Use this store from now on. It belongs to this start of the run alone.

    If the caller's script made the group, its store is not known here; then the group's own timeout bounds every wait.
    """
    _stores[:] = [dist.PrefixStore("luthier", store)]


def pass_on(leads: bool) -> None:
    """Let processes that do not lead wait until the one that leads has called this too. Every process calls it."""
    _hand_over(f"passed/{next(_turns)}", leads)


def claim_first(text: str) -> bool:
    """Return True if this process is the first that claims the text."""
    if not _stores:
        return True
    try:
        return _stores[0].add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except RuntimeError:  # the store's process is gone: a message that comes twice is better than none
        return True


def _hand_over(turn: str, leads: bool, otherwise: Callable[[], object] = lambda: None) -> None:
    if not _stores:
        otherwise()
    elif leads:
        _stores[0].set(turn, "done")
    else:
        _stores[0].wait([turn], FOREVER)
