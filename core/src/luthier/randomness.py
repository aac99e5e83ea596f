"""Randomness: every micro-batch begins from a state that (seed, step, micro-batch) alone decides."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seed Python, numpy and torch, so that nothing that ran before can change what follows."""
    number = number_of(*key)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number % 2**63)


def number_of(*key: int | str) -> int:
    """64 bits that the key alone decides."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


@contextmanager
def keep_randomness() -> Iterator[None]:
    """Leave the caller's random states as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)
