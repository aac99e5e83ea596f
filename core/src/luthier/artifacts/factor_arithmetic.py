"""Factor arithmetic: the low-rank pairs of several adapters are combined into one pair, layer by layer.

Linear, TIES and DARE work on each factor separately, as PEFT's `add_weighted_adapter` does, so their product is not the
weighted sum of the products; `cat` stacks the factors, and its product is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import attrs
import torch
from torch import Tensor

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "cat", "slao"]
PRUNED: Final = ("ties", "dare_linear", "dare_ties")  # methods that keep a share of the numbers
DRAWN: Final = ("dare_linear", "dare_ties")  # methods that choose these numbers at random


@attrs.frozen(kw_only=True, eq=False)
class Pair:
    """One adapter's factors of a layer: `a` [r, in] and `b` [out, r]; the update is `scale` b a."""

    a: Tensor
    b: Tensor
    scale: float


@attrs.frozen(kw_only=True)
class Blend:
    """The way to combine pairs: the method, a weight for each adapter, and the share of numbers that pruning keeps."""

    method: Method
    weights: tuple[float, ...]
    density: float = 1.0


def combine_pairs(pairs: Sequence[Pair], recipe: Blend, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A and B of one pair with scale 1. All pairs must have one shape, except for `cat`, whose ranks add up."""
    if recipe.method == "slao":
        return _merge_in_order(pairs)
    strengths = [weight * pair.scale for weight, pair in zip(recipe.weights, pairs, strict=True)]
    if recipe.method == "cat":
        stacked = [strength * pair.a for strength, pair in zip(strengths, pairs, strict=True)]
        return torch.cat(stacked), torch.cat([pair.b for pair in pairs], dim=1)
    # for each of the two factors, so that their product has the strength
    roots = [math.sqrt(abs(strength)) for strength in strengths]
    signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths, strict=True)]
    sides = (([p.a for p in pairs], signed), ([p.b for p in pairs], roots))
    a, b = (_combine_side(tensors, factors, recipe, generator) for tensors, factors in sides)
    return a, b


def _combine_side(
    tensors: Sequence[Tensor], factors: Sequence[float], recipe: Blend, generator: torch.Generator
) -> Tensor:
    """Return the sum of one factor of all adapters, weighted with their strengths."""
    if recipe.method in PRUNED:
        drop = keep_at_random if recipe.method in DRAWN else keep_largest
        tensors = [drop(tensor, recipe.density, generator) for tensor in tensors]
    stack = torch.stack(list(tensors))
    weighted = stack * torch.tensor(factors, dtype=stack.dtype).view(-1, 1, 1)
    if recipe.method not in ("ties", "dare_ties"):
        return weighted.sum(0)
    agreeing = stack.sign() == torch.where(stack.sum(0) >= 0, 1, -1)  # numbers with the sign of the unweighted sum
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def keep_largest(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the tensor with all but a share of its numbers, the largest, set to 0 (TIES, arXiv 2306.01708)."""
    if density >= 1:
        return tensor
    is_kept = torch.zeros_like(tensor).view(-1)
    is_kept[tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices] = 1
    return tensor * is_kept.view_as(tensor)


def keep_at_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the tensor with a random share of its numbers, rescaled to the same mean (DARE, arXiv 2311.03099)."""
    if density >= 1:
        return tensor
    is_kept = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * is_kept / density


def _merge_in_order(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return the last A, and each B merged into those before it by 1 / sqrt(its number) (SLAO, arXiv 2512.23017)."""
    merged = pairs[0].scale * pairs[0].b
    for number, pair in enumerate(pairs[1:], 2):
        merged = merged + (pair.scale * pair.b - merged) / math.sqrt(number)
    return pairs[-1].a, merged
