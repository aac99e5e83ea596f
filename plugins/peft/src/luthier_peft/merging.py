"""Merge an adapter into the base weights, completely or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import torch
from luthier import LuthierError
from peft import PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from luthier_peft.injection import WRAPPERS, warnings_heeded
from luthier_peft.methods import Method

UNMERGEABLE: Final = "artifact-unmergeable"


def merge(handle: PeftModel, trainable: Mapping[str, Tensor], where: str) -> Any:
    """Return the plain model. Raises `artifact-unmergeable` if PEFT refuses, or a layer of PEFT remains."""
    broken = [name for name, parameter in trainable.items() if not torch.isfinite(parameter).all()]
    if broken:
        raise LuthierError(UNMERGEABLE, "the adapter holds NaN or infinite numbers", where=where, found=broken[0])
    _untie(handle.get_base_model())
    try:
        with torch.no_grad(), warnings_heeded():
            model = handle.merge_and_unload()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise LuthierError(UNMERGEABLE, f"PEFT says: {error}", where=where) from error
    _unwrap_copies(model)
    left = [name for name, module in model.named_modules() if isinstance(module, WRAPPERS)]
    if left:
        raise LuthierError(UNMERGEABLE, "PEFT left layers unmerged", where=where, found=left[0])
    return model


def check(model: Any, method: Method, options: Any, where: str) -> None:
    """Raise `artifact-unmergeable`, before anything changes, if the method cannot be merged into these layers."""
    bias = method.folds_into_bias or getattr(options, "lora_bias", False)
    if bias:
        layers = {n: m.get_base_layer() for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        without = [name for name, layer in layers.items() if getattr(layer, "bias", None) is None]
        if without:
            problem = "it trains biases, but this layer has none to merge them into"
            raise LuthierError(UNMERGEABLE, problem, where=where, found=without[0])
    elif method.merging:
        raise LuthierError(UNMERGEABLE, method.merging, where=where)


def _untie(model: nn.Module) -> None:
    """Give adapted layers their own weight, since PEFT would merge the head's update into the tied embedding too.

    The config then says that they are not tied any more. Rows of trainable tokens are replaced, not added to, and may
    stay tied.
    """
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for module in list(model.modules()):
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            layer = module.get_base_layer()
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if holders[id(parameter)] > 1:
                    layer.register_parameter(name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _unwrap_copies(model: Any) -> None:
    """Replace whole modules (`modules_to_save`) by their trained copies, which PEFT's LN tuning forgets."""
    for name, module in list(model.named_modules()):
        if isinstance(module, WRAPPERS) and hasattr(module, "unload_and_optionally_merge_module"):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            model.set_submodule(name, plain)
