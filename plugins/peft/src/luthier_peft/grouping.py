"""Parameter groups: the trained parameters by role and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier import Group
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

Key = tuple[Any, float | None]  # role, weight decay


def groups(model: Any, trainable: Mapping[str, nn.Parameter]) -> list[Group]:
    """Return the trained parameters in groups by role. Vectors (scales, magnitudes, biases, norms) do not decay."""
    made: dict[Key, Group] = {}
    heads = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "head"}
    for name, parameter in trainable.items():
        role = _role(model, name, heads)
        decay = 0.0 if role == "embedding" or sum(size > 1 for size in parameter.shape) < 2 else None
        group = made.setdefault((role, decay), Group(parameters=[], names=[], role=role, weight_decay=decay))
        group.parameters.append(parameter)
        group.names.append(name)
    return list(made.values())


def _role(model: nn.Module, name: str, heads: Mapping[int, str]) -> Any:
    """Return the role: `adapter` for the adapter's tensors, and for copies of whole modules the module's role."""
    inside: nn.Module = model
    copied = False
    for step in name.split(".")[:-1]:
        inside = getattr(inside, step)
        if isinstance(inside, TrainableTokensLayer):
            return "embedding"
        if isinstance(inside, BaseTunerLayer):
            return "bias" if name.endswith("base_layer.bias") else "adapter"
        if isinstance(inside, AuxiliaryTrainingWrapper):
            copied = True
            if id(inside) in heads:
                return heads[id(inside)]
    if isinstance(inside, nn.Embedding):
        return "embedding"
    if name.endswith("bias"):
        return "bias"
    return "norm" if "norm" in type(inside).__name__.lower() else "hidden" if copied else "adapter"
