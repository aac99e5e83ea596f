"""Whole modules and biases that train besides the updates, with the originals for `disabled`."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from luthier_lora.layers import Switch


class Standing(nn.Module):
    """A module that replaces another one, and forwards its attributes."""

    place = ""  # the attribute that holds the other one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules[self.place], name)


class SavedModule(Standing):
    """A module that trains as a whole (PEFT's `modules_to_save`), and the frozen original."""

    place = "trained"

    def __init__(self, original: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.trained = copy.deepcopy(original).requires_grad_(True)
        self.switch = switch
        self.train(original.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.switch.enabled else self.original)(*args, **kwargs)

    def own(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by PEFT's names, which are those of the module itself."""
        return dict(self.trained.named_parameters())


class BiasedModule(Standing):
    """A module of which only the bias trains, and its original bias."""

    place = "base_layer"

    def __init__(self, base_layer: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.base_layer, self.switch = base_layer, switch
        self.first_bias = free_bias(base_layer)
        self.train(base_layer.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.switch.enabled:
            return self.base_layer(*args, **kwargs)
        return with_bias(self.base_layer, self.first_bias, *args, **kwargs)

    def own(self) -> dict[str, nn.Parameter]:
        return {"bias": self.base_layer.bias}  # type: ignore[dict-item]


def free_bias(layer: nn.Module) -> nn.Parameter:
    """Let the bias of a layer train, and return a frozen copy of it."""
    bias: Any = layer.bias
    first = nn.Parameter(bias.detach().clone(), requires_grad=False)
    bias.requires_grad_(True)
    return first


def with_bias(layer: nn.Module, bias: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return what the layer computes with another bias."""
    return functional_call(layer, {"bias": bias}, args, kwargs)


def has_bias(module: nn.Module) -> bool:
    """Return True if a module has a bias of its own that can train."""
    bias = module._parameters.get("bias")
    return bias is not None and bias.is_floating_point()
