"""Counts: parameters by kind of module, and what is held for them whatever the step."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from luthier.model.weights.parameter_roles import parameter_role
from luthier.plugins.contracts.values import Group

if TYPE_CHECKING:
    from luthier.step.setup import Setup


def parameters_of(setup: Setup) -> dict[str, dict[str, int]]:
    """Total and trainable parameters by kind of module, shared ones once, the adapter's apart."""
    model = setup.model
    adapted = {id(p) for g in setup.adapter.groups() if g.role == "adapter" for p in g.parameters}
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


def held_memory(setup: Setup) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer of a model that is loaded, without what a step needs."""
    stored = {id(t): t for t in (*setup.model.parameters(), *setup.model.buffers(), *setup.precision.kept)}
    trainable = [p for g in setup.optimizer.param_groups for p in g["params"]]
    companions = setup.companions.held_by(setup.step.policy, setup.constant_owners)
    return {
        "weights": sum(t.numel() * t.element_size() for t in stored.values()),
        "gradients": sum(p.numel() * _stepped_in(p).itemsize for p in trainable),
        "optimizer": _optimizer_bytes(setup, trainable),
        **{role: sum(t.numel() * t.element_size() for t in tensors) for role, tensors in companions.items()},
    }


def _stepped_in(parameter: torch.nn.Parameter) -> torch.dtype:
    """The dtype of its gradient, which for bfloat16 weights is float32."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _module_kind(path: str) -> str:
    names = path.lower()
    if "expert" in names or "router" in names or names.endswith(".gate"):
        return "experts"
    return "attention" if "att" in names else "mlp"


def _optimizer_bytes(setup: Setup, trainable: list[torch.nn.Parameter]) -> int:
    """Measured, not assumed: one step of a fresh optimizer of this kind over one tiny parameter."""
    sample = torch.nn.Parameter(torch.zeros(32, 32, dtype=_stepped_in(trainable[0])))
    sample.grad = torch.zeros_like(sample)
    optimizer = setup.optimizer_part.build([Group(parameters=[sample], names=["sample"])])
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[sample].values() if isinstance(t, torch.Tensor))
    return math.ceil(held / sample.numel() * sum(p.numel() for p in trainable))
