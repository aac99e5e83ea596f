"""A sample of a model's weights: those that are written in place of all where only the way of saving is tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from torch import Tensor

SAMPLE: Final = 64 << 20  # bytes of weights, the smallest first; a layer's norms and biases are among them

_written: ContextVar[set[str] | None] = ContextVar("sampled_names", default=None)


@contextmanager
def sampled_state() -> Iterator[set[str]]:
    """Let `save_model` write a sample of the weights within this context; the set holds their names afterwards."""
    names: set[str] = set()
    token = _written.set(names)
    try:
        yield names
    finally:
        _written.reset(token)


def sample_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a state that are written: all, or a sample. Tied ones are written together."""
    names = _written.get()
    if names is None:
        return state
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(tensor.data_ptr(), []).append(name)
    room = SAMPLE
    for group in sorted(tied.values(), key=lambda group: state[group[0]].nbytes):
        room -= state[group[0]].nbytes
        if names and room < 0:
            break
        names.update(group)
    return {name: tensor for name, tensor in state.items() if name in names}
