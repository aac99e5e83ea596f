"""The groups that the optimizer gets: LoRA+'s two rates, magnitudes that do not decay, and whole modules by role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from luthier import Group
from torch import nn

from luthier_lora.kept import SavedModule
from luthier_lora.merging import own_parameters, wrappers
from luthier_lora.token_rows import NAME

Role = Literal["hidden", "embedding", "head", "norm", "bias", "adapter"]
PLAIN: Final = ("lora_magnitude_vector", "lora_scale")  # parameters without weight decay


def name_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every trainable parameter by its path in the model, as PEFT's files name it."""
    named_wrappers = wrappers(model).items()
    return {f"{path}.{name}": p for path, wrapper in named_wrappers for name, p in own_parameters(wrapper).items()}


def make_groups(model: Any, named: Mapping[str, nn.Parameter], ratio: float) -> list[Group]:
    """Return the groups. The rate of B is `ratio` times that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354)."""
    groups: dict[tuple[Role, float, float | None], Group] = {}
    saved = {f"{path}.": module for path, module in wrappers(model).items() if isinstance(module, SavedModule)}
    for name, parameter in named.items():
        owner = next((module for path, module in saved.items() if name.startswith(path)), None)
        role = _role(model, name, owner)
        scale = ratio if role == "adapter" and name.endswith("lora_B.weight") else 1.0
        decay = 0.0 if name.endswith(PLAIN) else None
        fresh = Group(parameters=[], names=[], role=role, lr_scale=scale, weight_decay=decay)
        group = groups.setdefault((role, scale, decay), fresh)
        group.parameters.append(parameter)
        group.names.append(name)
    return list(groups.values())


def count_parameters(named: Mapping[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in named.values())


def _role(model: Any, name: str, owner: SavedModule | None) -> Role:
    if name.endswith("bias"):
        return "bias"
    if owner is None:
        return "embedding" if name.endswith(NAME) else "adapter"
    if isinstance(owner.original, nn.Embedding):
        return "embedding"
    if owner is model.get_output_embeddings():
        return "head"
    return "norm" if owner.original.weight.dim() < 2 else "hidden"  # type: ignore[operator]
