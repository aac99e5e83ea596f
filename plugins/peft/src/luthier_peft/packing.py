"""The packing check: an adapter that mixes the documents of a row is refused before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from luthier import Context, LuthierError
from torch import Tensor, nn

NOISE: Final = 0.02  # the usual deviation of fresh weights: large enough to see, small enough to stay finite


def check(model: nn.Module, parameters: Sequence[nn.Parameter], context: Context, where: str) -> None:
    """Raise `part-unsupported` if packed documents give other outputs than separate ones.

    Most methods start as the identity, where nothing could differ, so noise is added to the adapter first.
    """
    with _evaluating(model), _noisy(parameters, context.seed):
        reason = context.probe(model)
    if reason is not None:
        remedy = "Set packing: false, or choose another method."
        raise LuthierError("part-unsupported", f"unsupported: packing ({reason})", where=where, remedy=remedy)


@contextmanager
def _noisy(parameters: Sequence[nn.Parameter], seed: int) -> Iterator[None]:
    originals = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(_noise(parameter, generator))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, originals, strict=True):
                parameter.copy_(value)


def _noise(parameter: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * NOISE
    return drawn.to(parameter.device, parameter.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
