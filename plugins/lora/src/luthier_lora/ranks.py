"""Choose ranks from weights or gradients: the singular values that hold a share of the energy, in a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from luthier import Context, LuthierError
from torch import Tensor, nn

from luthier_lora.gradients import gradient_energies
from luthier_lora.layers import dense_weight, is_dense, sizes_of
from luthier_lora.options import Dora, Lora
from luthier_lora.patterns import find_pattern
from luthier_lora.targets import Targets


def choose_ranks(model: Any, options: Lora | Dora, targets: Targets, context: Context) -> Lora | Dora:
    """Return the options with the chosen rank of each layer in rank_pattern. A rank that the user wrote stays.

    The choice is a decision of the run: all processes, a resumed run, and the opened artifact have the same ranks.
    """
    if options.rank_energy is None and options.rank_budget is None:
        return options
    free = [name for name in targets.layers if find_pattern(options.rank_pattern, name) is None]
    layers = {name: model.get_submodule(name) for name in free}
    costs = {name: sum(sizes_of(layer)) for name, layer in layers.items()}
    budget = options.rank_budget
    if budget is not None and sum(costs.values()) > budget:
        problem = f"rank 1 in each of {len(costs)} layers takes {sum(costs.values())} parameters"
        raise LuthierError(
            "recipe-out-of-range", problem, where="rank_budget", found=budget, remedy="Target fewer layers."
        )

    def decide() -> dict[str, int]:
        advance = context.progress(len(layers), "singular values")
        if options.rank_gradient is None:
            energies = {name: _energies(layer, context, advance) for name, layer in layers.items()}
        else:
            energies = gradient_energies(model, layers, options.rank_gradient, context, advance)
        gains = _shares(energies) if options.rank_gradient is None else energies
        wanted = {name: min(options.r, count_energy(values, options.rank_energy)) for name, values in energies.items()}
        return wanted if budget is None else fit_budget(wanted, gains, costs, budget)

    ranks = context.decide("lora.ranks", decide, _bound_ranks(layers, options, costs))
    return attrs.evolve(options, rank_pattern={**options.rank_pattern, **ranks})


def _bound_ranks(layers: Mapping[str, nn.Module], options: Lora | Dora, costs: Mapping[str, int]) -> dict[str, int]:
    """Return ranks whose sum is the largest that may be chosen."""
    ranks = {name: min(options.r, *sizes_of(layer)) for name, layer in layers.items()}
    if options.rank_budget is None:
        return ranks
    return fit_budget(ranks, {name: [1.0] * rank for name, rank in ranks.items()}, costs, options.rank_budget)


def fit_budget(
    wanted: Mapping[str, int], gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return ranks from 1 to the `wanted` ones whose sum of rank * cost is at most `budget`.

    The directions with the largest gain per parameter are kept. The gains of a layer's directions are descending.
    """
    ranks, left = dict.fromkeys(wanted, 1), budget - sum(costs.values())
    further = [(gains[name][index] / costs[name], name) for name, rank in wanted.items() for index in range(1, rank)]
    for _, name in sorted(further, key=lambda pair: -pair[0]):  # a stable sort keeps the order of a layer's directions
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def _shares(energies: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return each direction's share of its layer's energy, since the scales of two layers cannot be compared."""
    return {name: [value / (sum(values) or 1.0) for value in values] for name, values in energies.items()}


def count_energy(values: Sequence[float], share: float | None) -> int:
    """Return how many of the first values reach a share of the sum, at least 1. None: all that are not 0."""
    total = sum(values)
    if share is None:
        return max(1, sum(value > 0 for value in values))
    energy = 0.0
    for count, value in enumerate(values, 1):
        energy += value
        if energy >= share * total:
            return count
    return max(1, len(values))


def hash_tensor(tensor: Tensor) -> str:
    """Return a hash of a tensor's values."""
    plain = tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(plain.data, digest_size=16).hexdigest()


def _energies(layer: nn.Module, context: Context, advance: Callable[..., None]) -> list[float]:
    """Return the squared singular values of a layer's weight, descending."""
    weight = (dense_weight(layer) if is_dense(layer) else context.dequantize(layer)).detach().float()
    spectrum = context.cache(f"singular values {hash_tensor(weight)}", lambda: {"values": torch.linalg.svdvals(weight)})
    advance()
    return spectrum["values"].double().square().tolist()
