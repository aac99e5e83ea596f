"""Ranks chosen from weights or gradients: how many singular values hold a share of the energy, within a budget."""

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
    """Return the options with a rank for each layer in rank_pattern, where they ask for that; a written rank stays.

    The ranks are a decision of the run: every rank of it, a resume and whoever opens the artifact get the same.
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
        told = context.progress(len(layers), "singular values")
        if options.rank_gradient is None:
            energies = {name: _energies(layer, context, told) for name, layer in layers.items()}
        else:
            energies = gradient_energies(model, layers, options.rank_gradient, context, told)
        gains = _shares(energies) if options.rank_gradient is None else energies
        wanted = {name: min(options.r, count_energy(values, options.rank_energy)) for name, values in energies.items()}
        return wanted if budget is None else fit_budget(wanted, gains, costs, budget)

    bound = {name: min(options.r, *sizes_of(layer)) for name, layer in layers.items()}
    ranks = context.decide("lora.ranks", decide, bound)
    return attrs.evolve(options, rank_pattern={**options.rank_pattern, **ranks})


def fit_budget(
    wanted: Mapping[str, int], gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return ranks of 1 to those `wanted` that, times `costs`, add up to `budget` at most.

    Kept are the directions with the largest gain per parameter; the gains of a layer's directions fall.
    """
    ranks, left = dict.fromkeys(wanted, 1), budget - sum(costs.values())
    further = [(gains[name][index] / costs[name], name) for name, rank in wanted.items() for index in range(1, rank)]
    for _, name in sorted(further, key=lambda pair: -pair[0]):  # stable: a layer's directions stay in their order
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def _shares(energies: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Each direction's share of its layer's energy: the sizes of two layers' weights say nothing of each other."""
    return {name: [value / (sum(values) or 1.0) for value in values] for name, values in energies.items()}


def count_energy(values: Sequence[float], share: float | None) -> int:
    """Return how many of the first values add up to a share of all, at least 1; None: as many as are not 0."""
    total = sum(values)
    if share is None:
        return max(1, sum(value > 0 for value in values))
    held = 0.0
    for count, value in enumerate(values, 1):
        held += value
        if held >= share * total:
            return count
    return max(1, len(values))


def hash_tensor(tensor: Tensor) -> str:
    """Return a digest of a tensor's values."""
    plain = tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(plain.data, digest_size=16).hexdigest()


def _energies(layer: nn.Module, context: Context, told: Callable[..., None]) -> list[float]:
    """Squared singular values of a layer's weight, falling."""
    weight = (dense_weight(layer) if is_dense(layer) else context.dequantize(layer)).detach().float()
    found = context.cache(f"singular values {hash_tensor(weight)}", lambda: {"values": torch.linalg.svdvals(weight)})
    told()
    return found["values"].double().square().tolist()
