"""Merge an adapter into its base weights, so that plain transformers computes the same."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from luthier import Context, LuthierError, TokenRows
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier_lora.experts import ParameterWrapper
from luthier_lora.kept import BiasedModule, SavedModule
from luthier_lora.layers import dense_weight, is_dense
from luthier_lora.token_rows import name_rows
from luthier_lora.wrappers import LoraLayer

Update = LoraLayer | ParameterWrapper
Wrapper = Update | SavedModule | BiasedModule | TokenRows


def wrappers(model: nn.Module) -> dict[str, Wrapper]:
    """Return every wrapper of a model by its path, outer before inner."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Wrapper)}


def own_parameters(wrapper: Wrapper) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of a wrapper by their names in it, which are PEFT's."""
    return name_rows(wrapper) if isinstance(wrapper, TokenRows) else wrapper.own()


@torch.no_grad()
def fold(model: Any, context: Context) -> Any:
    """Replace each wrapper by a plain layer. Every weight is checked before the first one changes.

    A quantized layer becomes a dense one in the context's dtype: rounding the sum to codes again would lose part of
    the update. A head that shares its weight with the embedding gets a weight of its own.
    """
    named_wrappers = wrappers(model)
    plain = _Plain(model, context)
    for name, wrapper in named_wrappers.items():
        plain.check(name, wrapper)
    for name in reversed(named_wrappers):  # of two nested wrappers the inner one first
        model.set_submodule(name, plain.layer(name, named_wrappers[name]))
    return model


class _Plain:
    """The maker of the plain module that replaces a wrapper."""

    def __init__(self, model: Any, context: Context) -> None:
        self.model, self.context = model, context
        parameters = model.named_parameters(remove_duplicate=False)
        self._owners = Counter(id(parameter) for _, parameter in parameters)
        self._skeleton: Any = None

    def check(self, name: str, wrapper: Wrapper) -> None:
        """Raise `artifact-unmergeable` if the merged weight would not compute what the wrapper does."""
        for part, parameter in own_parameters(wrapper).items():
            if not parameter.isfinite().all():
                raise _unmergeable(f"{name}.{part}", "the adapter holds NaN or infinity", "Use an earlier checkpoint.")
        if not isinstance(wrapper, Update):
            return
        base_weight = self._held(wrapper)
        dtype = self.context.dtype if base_weight is None else base_weight.dtype
        if not wrapper.folded().to(dtype).isfinite().all():
            problem = f"the merged weight has NaN or leaves the range of {dtype}"
            raise _unmergeable(name, problem, "Load the base in bfloat16 or float32, or check its checkpoint.")
        is_head = isinstance(wrapper, LoraLayer) and wrapper is self.model.get_output_embeddings()
        if self._is_shared(base_weight) and not is_head:
            problem = "another module shares this weight, so a merge would change that module too"
            raise _unmergeable(name, problem, "Save the adapter itself, or leave this layer out of its targets.")

    def layer(self, name: str, wrapper: Wrapper) -> nn.Module:
        """Return the module that replaces a wrapper. A dense weight is changed in place."""
        if isinstance(wrapper, SavedModule):
            return self._whole(wrapper)
        layer: Any = wrapper.base_layer.requires_grad_(False)
        if isinstance(wrapper, TokenRows):
            return wrapper.write_rows()
        if isinstance(wrapper, BiasedModule):
            return layer
        weight, base_weight = wrapper.folded(), self._held(wrapper)
        if isinstance(wrapper, ParameterWrapper):
            wrapper.parameter.copy_(weight)
            return layer
        if base_weight is None:
            return self._dense(name, layer, weight)
        if self._is_shared(base_weight):
            self._untie(layer)
        dense_weight(layer).copy_(weight)
        return layer

    def _whole(self, wrapper: SavedModule) -> nn.Module:
        """Return the trained module. If the original's weight was tied, the config says that this one is not."""
        if any(self._is_shared(parameter) for parameter in wrapper.original.parameters()):
            self._say_untied()
        return wrapper.trained.requires_grad_(False)

    def _held(self, wrapper: Update) -> nn.Parameter | None:
        """Return the parameter of the base weight, or None if it is quantized."""
        if isinstance(wrapper, ParameterWrapper):
            return wrapper.parameter
        return wrapper.base_layer.weight if is_dense(wrapper.base_layer) else None  # type: ignore[return-value]

    def _is_shared(self, parameter: nn.Parameter | None) -> bool:
        return parameter is not None and self._owners[id(parameter)] > 1

    def _untie(self, head: Any) -> None:
        """Give a head that shared the embedding's weight its own weight, and say so in the config."""
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        self._say_untied()

    def _say_untied(self) -> None:
        for config in (self.model.config, self.model.config.get_text_config()):
            config.tie_word_embeddings = False

    def _dense(self, name: str, layer: Any, weight: Tensor) -> nn.Module:
        """Return a layer of the class that the model's own code makes here, for a quantized one."""
        outputs, inputs = weight.shape
        bias = getattr(layer, "bias", None)
        if isinstance(self._original(name), Conv1D):
            dense: Any = Conv1D(outputs, inputs)
        else:
            dense = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias is not None)
        dense.to(device=weight.device, dtype=self.context.dtype).requires_grad_(False).train(layer.training)
        dense_weight(dense).copy_(weight)
        if bias is not None:
            dense.bias.copy_(bias)
        return dense

    def _original(self, name: str) -> nn.Module:
        """Return the layer of this name in a model of the same config, without weights."""
        if self._skeleton is None:
            with torch.device("meta"):
                self._skeleton = type(self.model)(copy.deepcopy(self.model.config))
        return self._skeleton.get_submodule(name)


def _unmergeable(where: str, problem: str, remedy: str) -> LuthierError:
    return LuthierError("artifact-unmergeable", problem, where=where, remedy=remedy)
