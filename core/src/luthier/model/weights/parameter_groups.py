"""Groups with rates of their own: by the depth of a layer, and by patterns of parameter names."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from luthier.errors import LuthierError
from luthier.model.weights.layers import layer_depths
from luthier.plugins.contracts.values import Group


def scale_groups(groups: Sequence[Group], model: Any, *, decay: float, multipliers: Mapping[str, float]) -> list[Group]:
    """Return the adapter's groups, each split where its parameters' rates differ, in their order.

    A parameter of decoder layer i of L has decay^(L - 1 - i) times its group's rate, an embedding decay^L, as there
    are so many layers between it and the head (Howard and Ruder 2018, arXiv 1801.06146); what is in neither keeps it.
    Each multiplier whose pattern is found in its name comes on top. Raises `model-target` for one that is in none.
    """
    if decay == 1.0 and not multipliers:
        return list(groups)
    _check(multipliers, [name for group in groups for name in group.names])
    distances = _distances(model) if decay != 1.0 else {}
    scaled: list[Group] = []
    for group in groups:
        parts: dict[float, Group] = {}
        for name, parameter in zip(group.names, group.parameters, strict=True):
            factor = decay ** distances.get(id(parameter), 0)
            factor *= math.prod(value for pattern, value in multipliers.items() if re.search(pattern, name))
            fresh = attrs.evolve(group, parameters=[], names=[], lr_scale=group.lr_scale * factor)
            part = parts.setdefault(factor, fresh)
            part.parameters.append(parameter)
            part.names.append(name)
        scaled += parts.values()
    return scaled


def describe_groups(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Plain data of each: its role, size and factor of the learning rate, its own decay, and its first names."""
    return [
        {
            "role": group.role,
            "tensors": len(group.parameters),
            "parameters": sum(p.numel() for p in group.parameters),
            "lr_scale": group.lr_scale,
            "weight_decay": group.weight_decay,
            "names": group.names[:3],
        }
        for group in groups
    ]


def _distances(model: Any) -> dict[int, int]:
    """Return how many decoder layers lie between each parameter and the head, by identity; the head's own are not in
    it.
    """
    numbers = layer_depths(model)
    distances: dict[int, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            distances |= {id(p): len(numbers) for p in module.parameters()}
        elif path in numbers:
            distances |= {id(p): len(numbers) - 1 - numbers[path] for p in module.parameters()}
    return distances


def _check(multipliers: Mapping[str, float], names: Sequence[str]) -> None:
    for pattern in multipliers:
        if not any(re.search(pattern, name) for name in names):
            remedy = f"Near misses: {', '.join(_near(pattern, names))}."
            problem = "the pattern is found in no trained parameter's name"
            raise LuthierError("model-target", problem, where="lr_multipliers", found=pattern, remedy=remedy)


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the names with a part like one of the pattern's words, or else the first ones; layers' numbers are left
    out.
    """
    forms = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    words = set(re.findall(r"[A-Za-z_]\w*", pattern))
    parts = {part for form in forms for part in form.split(".")}
    hits = {hit for word in words for hit in difflib.get_close_matches(word, parts, 1, 0.5)}
    return [form for form in forms if hits & set(form.split("."))][:4] or forms[:4]
