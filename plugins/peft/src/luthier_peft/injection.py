"""Put PEFT's layers into a model, in place and from the run's seed, and turn PEFT's complaints into errors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from luthier import Context, LuthierError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from luthier_peft.targets import check_targets, no_default

REFUSALS: Final = (ValueError, TypeError, NotImplementedError, AssertionError, KeyError, ImportError, Warning)
# PEFT only warns if an option matched nothing and had no effect
IGNORED: Final = r"(?s).*(did not match any targeted module|no modules? (was matched|were excluded)|no tied modules)"
NOISE: Final = (
    "fan_in_fan_out is set",  # PEFT then sets it for each layer
    r"(?s).*is_gradient_checkpointing",  # a warning of transformers to PEFT
    "Failed to load the CUDA extension|Setting boft_n_butterfly_factor to 1",  # not needed for factor 1, the only one
    "Unsupported layer type .*Norm",  # LN tuning adapts norms
    "(?s)Model (has|with) `tie_word_embeddings",  # a merge unties what must be untied
)
WRAPPERS: Final = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def inject(model: nn.Module, config: Any, context: Context, where: str) -> PeftModel:
    """Replace the targets in `model` by PEFT's layers, freeze the rest, and return PEFT's model around it.

    Raises `model-target`, `part-unsupported` or `recipe-out-of-range`.
    """
    if any(isinstance(module, WRAPPERS) for module in model.modules()):
        problem, remedy = "this model has an adapter of PEFT already", "Merge it, or load the model again."
        raise LuthierError("part-unsupported", problem, where=where, remedy=remedy)
    check_targets(model, config, where)
    try:
        with _seeded(context), warnings_heeded(_patterns(config)):
            handle = PeftModel(model, config)
    except REFUSALS as error:
        if context.purpose == "plan" and hasattr(config, "mask_fn"):
            raise  # SHiRA counts the entries of its mask, which a tensor without data does not have
        raise _refusal(error, model, where) from error
    _freeze_settings(model)
    _place_parameters(handle, context.device)
    return handle


@contextmanager
def _seeded(context: Context) -> Iterator[None]:
    """Seed torch's global generators, from which PEFT draws, and restore them afterwards."""
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(context.seed)
        yield


@contextmanager
def warnings_heeded(given: Iterable[str] = ()) -> Iterator[None]:
    """Turn warnings that an option has no effect into errors, and silence those that do not apply here.

    PEFT adds its own patterns to an option and warns about these too. Only the `given` ones count.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=IGNORED)
        unmatched = r"(?s)The following \w+_pattern keys did not match"
        warnings.filterwarnings("ignore", message=unmatched)  # a later filter takes precedence
        own = "|".join(re.escape(repr(pattern)) for pattern in given)
        if own:
            warnings.filterwarnings("error", message=rf"{unmatched}.*({own})")
        for noise in NOISE:
            warnings.filterwarnings("ignore", message=noise)
        yield


def _patterns(config: Any) -> list[str]:
    """Return the patterns for names of layers in the options."""
    return [key for name in ("rank_pattern", "alpha_pattern") for key in getattr(config, name, None) or ()]


def _refusal(error: Exception, model: nn.Module, where: str) -> LuthierError:
    text = " ".join(str(error).split())
    if "Please specify `target_modules`" in text:
        return no_default(model, where)
    if isinstance(error, ImportError):
        return LuthierError("dependency-missing", text, where=where, remedy="Install what PEFT names.")
    if isinstance(error, (Warning, NoMatchingPeftModuleError)):
        return LuthierError("model-target", text, where=where)
    if "support" in text or isinstance(error, NotImplementedError):
        remedy = "Change target_modules, or choose another method."
        return LuthierError("part-unsupported", f"PEFT says: {text}", where=where, remedy=remedy)
    remedy = "Change the options that PEFT names."
    return LuthierError("recipe-out-of-range", f"PEFT says: {text}", where=where, remedy=remedy)


def _freeze_settings(model: nn.Module) -> None:
    """Freeze tensors that are settings of a layer: PEFT trains AdaLoRA's `ranknum` after a cast."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name, parameter in module.named_parameters():
                first = name.partition(".")[0]
                if first in module.other_param_names and first not in module.adapter_layer_names:
                    parameter.requires_grad_(False)


def _place_parameters(handle: PeftModel, device: torch.device) -> None:
    """Move parameters to the weights' device that PEFT 0.21 leaves on the CPU, such as most of TinyLoRA's vectors."""
    for module in handle.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != device.type:
                placed = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
                module.register_parameter(name, placed)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer once, shared ones under their first name."""
    yield from module.named_parameters()
    yield from module.named_buffers()
