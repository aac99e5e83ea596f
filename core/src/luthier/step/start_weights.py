"""Penalties of the weights that train, and the copies of these from before the first step, for those that ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from luthier.model.weights.shard_tensors import own_shard, take_rows
from luthier.plugins.completion import has_default
from luthier.plugins.contracts.protocols import Adapter
from luthier.plugins.contracts.side_protocols import Penalty
from luthier.plugins.contracts.values import Group
from luthier.step.setup import START, Setup


class StartWeights:
    """Copies of an adapter's groups. A run keeps them as constants; on a sharded model each rank keeps its shards."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.groups: list[Group] = []
        self.capture()

    def capture(self) -> None:
        """Copy the groups as they are now."""
        self.groups = []  # so that two copies are held at no time
        self.groups = [attrs.evolve(group, parameters=_copies(group.parameters)) for group in self.adapter.groups()]

    def constants(self) -> dict[str, Tensor]:
        """Return the copies by name."""
        return dict(self._named())

    @torch.no_grad()
    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Take what `constants` returned when the run began."""
        for name, copy in self._named():
            own_shard(copy).copy_(take_rows(constants[name].to(own_shard(copy).device), copy))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for number, group in enumerate(self.groups):
            for name, copy in zip(group.names, group.parameters, strict=True):
                yield f"{number}.{name}", copy


def _copies(parameters: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().clone(), requires_grad=False) for parameter in parameters]


def keep_start(adapter: Adapter, penalties: Sequence[Penalty]) -> dict[str, StartWeights]:
    """Return the copies by their owner's name, or nothing if no penalty has a `begin`."""
    asks = any(not has_default(penalty, "penalty", "begin") for penalty in penalties)
    return {START: StartWeights(adapter)} if asks else {}


def sum_penalties(adapter: Adapter, penalties: Sequence[Penalty]) -> Tensor | None:
    """Return the sum of an adapter's own penalty and those of its weights, a scalar; None if there is none."""
    groups = adapter.groups() if penalties else []
    values = [adapter.penalty(), *(penalty.measure(groups) for penalty in penalties)]
    total: Tensor | None = None
    for value in values:
        if value is not None:
            total = value if total is None else total + value
    return total


def begin_penalties(setup: Setup, constants: Iterable[str] = ()) -> None:
    """Hand the penalties the weights of the start: those of now, unless `constants` of a resumed run name kept ones."""
    start = setup.constant_owners.get(START)
    if not isinstance(start, StartWeights):
        return
    if START not in constants:
        start.capture()
    for penalty in setup.penalties:
        penalty.begin(start.groups)
