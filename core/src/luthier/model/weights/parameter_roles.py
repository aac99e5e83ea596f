"""Roles of parameters: which belong to the head, the embeddings, norms, biases, or the hidden layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from luthier.plugins.contracts.values import Group, Role


def parameter_role(name: str, owner: nn.Module, embedding: nn.Module | None, head: nn.Module | None) -> Role:
    """Return the role of the parameter `name` of the module `owner`, in a model with these embeddings and this head."""
    if owner is embedding or isinstance(owner, nn.Embedding):
        return "embedding"
    if owner is head:
        return "head"
    if name.endswith("bias"):
        return "bias"
    if "norm" in type(owner).__name__.lower() or getattr(owner, name).dim() < 2:
        return "norm"
    return "hidden"


def by_role(model: Any) -> list[Group]:
    """Return every trainable parameter of a model once, in one group for each role."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    groups: dict[Role, Group] = {}
    seen: set[int] = set()
    for path, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            kind = parameter_role(name, owner, embedding, head)
            group = groups.setdefault(kind, Group(parameters=[], names=[], role=kind))
            group.parameters.append(parameter)
            group.names.append(f"{path}.{name}" if path else name)
    return list(groups.values())
