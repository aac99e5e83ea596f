"""The weights of the base that train in place: all if the ratio is 1, or the non-targets on request."""

from __future__ import annotations

from typing import Any

from luthier import Group
from torch import nn

from luthier_osft.layers import OsftLayer


def choose_trained(model: Any, targets: set[str], *, with_targets: bool) -> list[str]:
    """Unfreeze the parameters that train in place and return their names; targets only `with_targets`."""
    wrapped = {name for name, module in model.named_modules() if isinstance(module, OsftLayer)}
    weights = {f"{name}.base_layer.weight" for name in wrapped} | {f"{name}.weight" for name in targets}
    own = tuple(f"{name}." for name in wrapped)
    chosen = []
    for name, parameter in model.named_parameters():
        is_own = name.startswith(own) and ".base_layer." not in name
        is_target = name in weights and not (with_targets and name.removesuffix(".weight") in targets - wrapped)
        if parameter.is_floating_point() and parameter.element_size() > 1 and not is_own and not is_target:
            parameter.requires_grad_(True)
            chosen.append(name)
    return chosen


def group_by_role(model: Any, chosen: set[str]) -> list[Group]:
    """Return the chosen parameters in one group for each role, as the adapter `full` does."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    groups: dict[str, Group] = {}
    for path, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if full in chosen:
                role: Any = _role_of(name, owner, embedding, head)
                group = groups.setdefault(role, Group(parameters=[], names=[], role=role))
                group.parameters.append(parameter)
                group.names.append(full)
    return list(groups.values())


def _role_of(name: str, owner: nn.Module, embedding: nn.Module, head: nn.Module | None) -> str:
    if owner is embedding or isinstance(owner, nn.Embedding):
        return "embedding"
    if owner is head:
        return "head"
    if name.endswith("bias"):
        return "bias"
    return "norm" if "norm" in type(owner).__name__.lower() or getattr(owner, name).dim() < 2 else "hidden"
