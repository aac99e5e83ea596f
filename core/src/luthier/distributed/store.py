"""Notes that processes leave for each other in the store that they met at: no collective, and no hurry."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import torch.distributed as dist

FOREVER: Final = timedelta(days=365)  # whoever waits is ended by the launcher where the other fails
_stores: list[dist.Store] = []
_turns = itertools.count()


def keep_store(store: dist.Store) -> None:
    """Use this store from now on; it is of this start of the run alone.

    A group that the caller's script has made has no store that we know of: there its own timeout bounds every wait.
    """
    _stores[:] = [dist.PrefixStore("luthier", store)]


def pass_on(leads: bool) -> None:
    """Every process calls this: those that do not lead wait until the one that leads has come here."""
    _hand_over(f"passed/{next(_turns)}", leads)


def claim_first(text: str) -> bool:
    """Return True if this process is the first to say so."""
    if not _stores:
        return True
    try:
        return _stores[0].add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except RuntimeError:  # the store's process is gone: better twice than never
        return True


def _hand_over(turn: str, leads: bool, otherwise: Callable[[], object] = lambda: None) -> None:
    if not _stores:
        otherwise()
    elif leads:
        _stores[0].set(turn, "done")
    else:
        _stores[0].wait([turn], FOREVER)
