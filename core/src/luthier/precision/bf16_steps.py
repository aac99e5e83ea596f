"""Steps of bfloat16 weights: the optimizer sees float32, and what it makes of it goes back into bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from luthier.precision.rounding import round_stochastically
from luthier.randomness import number_of

CHUNK: Final = 1 << 24  # weights in float32 at once, 64 MiB, if an optimizer can step some without the others


class StochasticStep:
    """The weights are bfloat16 alone: each step is computed in float32 and rounded by chance (`round_stochastically`).

    `separable`: the optimizer may be stepped with the gradients of some parameters at a time, so that only those are
    in float32 at once.
    """

    def __init__(self, seed: int, *, separable: bool = False) -> None:
        self.seed, self.separable = seed, separable

    def step(self, optimizer: torch.optim.Optimizer, index: int) -> None:
        """Run optimizer step `index` (0-based). Seed and index fix the stochastic rounding."""
        chances: dict[torch.device, torch.Generator] = {}
        for chunk in self._chunks(optimizer):
            with _alone(optimizer, chunk), _widened(chunk, [p.detach().float() for p in chunk]) as low_tensors:
                optimizer.step()
                for low, parameter in zip(low_tensors, chunk, strict=True):
                    device = parameter.device
                    if device not in chances:
                        chances[device] = torch.Generator(device)
                        chances[device].manual_seed(number_of(self.seed, index, "rounding"))
                    low.copy_(round_stochastically(parameter.detach(), chances[device]))

    def state(self) -> dict[str, Any]:
        """Nothing is kept between steps."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing was kept."""

    def _chunks(self, optimizer: torch.optim.Optimizer) -> Iterator[list[nn.Parameter]]:
        chunk: list[nn.Parameter] = []
        for parameter in _reached(optimizer):
            if chunk and self.separable and sum(p.numel() for p in chunk) + parameter.numel() > CHUNK:
                yield chunk
                chunk = []
            chunk.append(parameter)
        if chunk:
            yield chunk


class MasterStep:
    """The optimizer steps float32 copies that are kept; the model computes with their nearest bfloat16.

    `masters` holds them by parameter, as they were before they were rounded.
    """

    def __init__(self, masters: Mapping[nn.Parameter, Tensor]) -> None:
        self.masters = dict(masters)

    def step(self, optimizer: torch.optim.Optimizer, index: int) -> None:
        chunk = _reached(optimizer)
        with _widened(chunk, [newest_master(self.masters[p], p) for p in chunk]) as low_tensors:
            optimizer.step()
            for low, parameter in zip(low_tensors, chunk, strict=True):
                low.copy_(parameter.detach())

    def state(self) -> dict[str, Any]:
        return {"masters": [newest_master(master, p) for p, master in self.masters.items()]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for master, saved_master in zip(self.masters.values(), state["masters"], strict=True):
            master.copy_(saved_master)


def newest_master(master: Tensor, parameter: Tensor) -> Tensor:
    """Return the float32 copy, brought up to date where something else than the optimizer has changed the parameter
    since.
    """
    low = parameter.detach()
    return master.copy_(torch.where(master.to(low.dtype) == low, master, low.float()))


def put_tensor(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Let a parameter hold another tensor, of another dtype too; whoever has the parameter has it still."""
    parameter.data = tensor
    if is_traceable_wrapper_subclass(tensor):  # such a tensor keeps another one inside, which `data` does not reach
        for name in tensor.__tensor_flatten__()[0]:
            setattr(parameter, name, getattr(tensor, name))


def _reached(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@contextmanager
def _alone(optimizer: torch.optim.Optimizer, chunk: Sequence[nn.Parameter]) -> Iterator[None]:
    """Hide the other parameters' gradients within this context, so that the optimizer passes them by."""
    members = set(chunk)
    others = [(p, p.grad) for p in _reached(optimizer) if p not in members]
    for parameter, _ in others:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in others:
            parameter.grad = gradient


@contextmanager
def _widened(parameters: Sequence[nn.Parameter], wide: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Let the parameters hold the tensors `wide` within this context; yield what they held, and restore it."""
    narrow = [p.detach() for p in parameters]
    for parameter, weight in zip(parameters, wide, strict=True):
        put_tensor(parameter, weight)
    try:
        yield narrow
    finally:
        for parameter, low in zip(parameters, narrow, strict=True):
            put_tensor(parameter, low)
