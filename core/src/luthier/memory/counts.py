"""Counts: parameters by kind of module, and what is held for them whatever the step."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from luthier.model.weights.parameter_roles import parameter_role
from luthier.plugins.contracts.values import Group

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from luthier.plugins.contracts.protocols import Adapter, Optimizer


def parameters_of(model: Any, adapter: Adapter) -> dict[str, dict[str, int]]:
    """Return total and trainable parameters by kind of module, shared ones once, the adapter's apart."""
    adapted = {id(p) for g in adapter.groups() if g.role == "adapter" for p in g.parameters}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"total": 0, "trainable": 0})
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    seen: set[int] = set()
    for path, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            role = parameter_role(name, owner, embedding, head)
            kind = "adapter" if id(parameter) in adapted else _module_kind(path) if role == "hidden" else role
            counts[kind]["total"] += parameter.numel()
            counts[kind]["trainable"] += parameter.numel() if parameter.requires_grad else 0
    whole = {key: sum(c[key] for c in counts.values()) for key in ("total", "trainable")}
    return {**counts, "all": whole}


def held_memory(
    weights: Iterable[Tensor], trainable: list[torch.nn.Parameter], optimizer: Optimizer,
    companions: Mapping[str, Iterable[Tensor]],
) -> dict[str, int]:  # fmt: skip
    """Return the bytes of weights, gradients, optimizer and companions of a loaded model, without those of a step.

    `weights` are parameters and buffers; one that comes twice is counted once.
    """
    stored = {id(t): t for t in weights}
    return {
        "weights": sum(t.numel() * t.element_size() for t in stored.values()),
        "gradients": sum(p.numel() * _stepped_in(p).itemsize for p in trainable),
        "optimizer": _optimizer_bytes(optimizer, trainable),
        **{role: sum(t.numel() * t.element_size() for t in tensors) for role, tensors in companions.items()},
    }


def _stepped_in(parameter: torch.nn.Parameter) -> torch.dtype:
    """Return the dtype of a parameter's gradient, which for bfloat16 weights is float32."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _module_kind(path: str) -> str:
    names = path.lower()
    if "expert" in names or "router" in names or names.endswith(".gate"):
        return "experts"
    return "attention" if "att" in names else "mlp"


def _optimizer_bytes(part: Optimizer, trainable: list[torch.nn.Parameter]) -> int:
    """Return the bytes of the optimizer's state, measured by one step of a fresh one over a small parameter."""
    sample = torch.nn.Parameter(torch.zeros(128, 128, dtype=_stepped_in(trainable[0])))
    sample.grad = torch.zeros_like(sample)
    optimizer = part.build([Group(parameters=[sample], names=["sample"])])
    optimizer.step()
    size = sum(t.numel() * t.element_size() for t in optimizer.state[sample].values() if isinstance(t, torch.Tensor))
    return math.ceil(size / sample.numel() * sum(p.numel() for p in trainable))
