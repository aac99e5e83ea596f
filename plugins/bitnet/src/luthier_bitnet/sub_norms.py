"""Sub-norms: an RMSNorm before single layers, begun at the size of their inputs (BitDistill, arXiv 2510.13998)."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from luthier import Context, LuthierError
from torch import Tensor, nn

EXAMPLES = 8  # rows of the training data whose states are measured
Sums = dict[str, tuple[float, int]]


def choose_sizes(
    model: nn.Module, layers: Mapping[str, nn.Module], names: Collection[str], context: Context
) -> dict[str, float]:
    """Return path -> the root mean square of its inputs, for the layers that get a norm.

    It is measured on the first rows of the training data, once in a run: a decision that its artifact keeps. Raises
    `model-target` where a name is that of no layer.
    """
    if not names:
        return {}
    chosen = {path: layer for path, layer in layers.items() if path.rpartition(".")[2] in names}
    known = {path.rpartition(".")[2] for path in layers}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known) or sorted(known)
            remedy = f"Name the last part of a layer's path: {', '.join(near)}."
            raise LuthierError("model-target", f"{name!r} is no quantized layer", where="sub_norms", remedy=remedy)
    unknown = dict.fromkeys(chosen, 1.0)  # of weights that are still to be read, with those of the norms
    measure = functools.partial(_measured, model, chosen, context)
    sizes = context.decide("sub_norms", lambda: measure() if context.has_values else unknown, bound=unknown)
    return {path: float(sizes.get(path, 1.0)) for path in chosen}


def _measured(model: nn.Module, layers: Mapping[str, nn.Module], context: Context) -> dict[str, float]:
    sums: Sums = {}
    with _summed(layers, sums):
        for batch in context.batches(EXAMPLES):
            context.forward(model, batch)
    return {path: (total / count) ** 0.5 for path, (total, count) in sums.items() if total > 0}


@contextmanager
def _summed(layers: Mapping[str, nn.Module], sums: Sums) -> Iterator[None]:
    """Meanwhile add up the squares of the inputs of each layer."""

    def watch(path: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total, count = sums.get(path, (0.0, 0))
            states = inputs[0].detach()
            squares = float(states.to(torch.float32).square().sum(dtype=torch.float64))
            sums[path] = (total + squares, count + states.numel())

        return add

    with ExitStack() as stack:
        for path, layer in layers.items():
            handle = layer.register_forward_pre_hook(watch(path))
            stack.callback(handle.remove)
        yield
