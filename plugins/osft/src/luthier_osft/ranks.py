"""Choose how many singular directions of each layer are preserved."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from luthier import Context, get_logger
from torch import Tensor, nn

from luthier_osft import Osft
from luthier_osft.layers import count_features

log = get_logger()


def preserved_rank(size: int, share: float) -> int:
    """Return floor(size * share), computed from the decimal digits of the share."""
    return int(size * Fraction(repr(share)))


def fixed_rank(size: int, ratio: float) -> int:
    """Return floor(size * (1 - ratio)), computed from the decimal digits of the ratio."""
    return int(size * (1 - Fraction(repr(ratio))))


def scheduled_rank(size: int, index: int, total: int) -> int:
    """Return the directions that task `index` (from 0) of `total` preserves: the share index / total."""
    return size * index // total


def find_ranks(model: Any, names: list[str], options: Osft, context: Context) -> dict[str, int]:
    """Return the number of directions of each layer that the first task preserves."""
    sizes = {name: min(count_features(model.get_submodule(name)) or (0, 0)) for name in names}
    if options.rank_rule == "schedule":
        return dict.fromkeys(names, 0)
    if options.rank_rule == "fixed":
        return {name: fixed_rank(size, options.ratio) for name, size in sizes.items()}
    least = {name: preserved_rank(size, options.minimum) for name, size in sizes.items()}
    decided = context.decide("osft_ranks", lambda: _important_ranks(model, sizes, options, context), bound=least)
    return {name: int(decided[name]) for name in names}


def _important_ranks(model: Any, sizes: Mapping[str, int], options: Osft, context: Context) -> dict[str, int]:
    shares = preserved_shares(measure_importance(model, list(sizes), options.num_batches, context), options)
    log.info("osft ranks by importance", least=min(shares.values()), most=max(shares.values()))
    return {name: preserved_rank(size, shares[name]) for name, size in sizes.items()}


def preserved_shares(importance: Mapping[str, float], options: Osft) -> dict[str, float]:
    """Return the paper's f(l) = m + I(l) (t - m), kept within m and t = 1 - ratio (arXiv 2504.07097, section 3)."""
    least, most = options.minimum, 1 - options.ratio
    shares = {name: least + value * (most - least) for name, value in importance.items()}
    return {name: float(f"{min(max(share, least), most):.9g}") for name, share in shares.items()}


def measure_importance(model: Any, names: list[str], count: int, context: Context) -> dict[str, float]:
    """Return I(l): the mean cosine of a layer's input and output over tokens, divided by its mean over the layers.

    If the sizes differ, both are cut to the smaller. If the mean is not positive, all importances are 1.
    """
    sums = dict.fromkeys(names, 0.0)
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda layer, inputs, output, name=name: sums.__setitem__(name, sums[name] + _alike(layer, inputs, output))
        )
        for name in names
    ]
    try:
        for batch in context.batches(count):
            context.forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    mean = sum(sums.values()) / max(len(names), 1)
    return {name: value / mean if mean > 0 else 1.0 for name, value in sums.items()}


def _alike(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> float:
    """Return the sum over tokens of cos(x, W x)."""
    bias = getattr(layer, "bias", None)
    x = inputs[0].detach().flatten(0, -2).double()
    y = (output if bias is None else output - bias).detach().flatten(0, -2).double()
    size = min(x.shape[1], y.shape[1])
    return float(torch.cosine_similarity(x[:, :size], y[:, :size]).sum())
