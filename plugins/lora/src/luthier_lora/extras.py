"""The modules, biases and rows of tokens that train besides the updates."""

from __future__ import annotations

from typing import Any

import attrs
from luthier import LuthierError, place_token_rows
from torch import nn

from luthier_lora.kept import BiasedModule, SavedModule, has_bias
from luthier_lora.layers import Switch
from luthier_lora.options import LowRank
from luthier_lora.targets import Targets, unmatched
from luthier_lora.token_rows import check_rows


@attrs.frozen(kw_only=True)
class Extras:
    """The full names of modules that train as a whole, and of those outside the targets whose bias trains.

    `tokens` are the ids of tokens whose rows of the embedding train.
    """

    saved: tuple[str, ...] = ()
    biased: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()

    def stand(self, model: Any, switch: Switch) -> None:
        """Replace each module by one that holds the trained and the original form."""
        for name in self.saved:
            model.set_submodule(name, SavedModule(model.get_submodule(name), switch))
        for name in self.biased:
            model.set_submodule(name, BiasedModule(model.get_submodule(name), switch))
        if self.tokens:
            place_token_rows(model, self.tokens, own_head=False, switch=switch)


def find_extras(model: Any, options: LowRank, targets: Targets) -> Extras:
    """Return what the options name in this model. Raises `model-target` if that is nothing."""
    modules = dict(model.named_modules())
    saved, tokens = (
        _saved(modules, options.modules_to_save or [], targets),
        tuple(options.trainable_token_indices or ()),
    )
    if tokens:
        check_rows(model, list(tokens), saved, targets)
    if options.bias == "none":
        return Extras(saved=saved, tokens=tokens)
    biases = [name for name, module in modules.items() if has_bias(module) and name not in saved]
    adapted = [name for name in biases if name in targets.layers]
    if not (adapted if options.bias == "lora_only" else biases):
        problem = "no adapted layer has a bias" if options.bias == "lora_only" else "the model has no bias"
        remedy = "Set bias: none." if not biases else "Set bias: all, or target layers that have one."
        raise LuthierError("model-target", problem, where="bias", found=options.bias, remedy=remedy)
    others = [name for name in biases if name not in targets.layers] if options.bias == "all" else []
    return Extras(saved=saved, biased=tuple(others), tokens=tokens)


def _saved(modules: dict[str, nn.Module], wanted: list[str], targets: Targets) -> tuple[str, ...]:
    whole = [name for name, module in modules.items() if name and _can_train(module)]
    for end in wanted:
        hits = [
            name for name in modules if name.endswith(end)
        ]  # PEFT's rule here: a name may end anywhere, not only after a dot
        if not hits:
            raise unmatched("modules_to_save", end, whole)
        for name in hits:
            _check_saved(end, name, modules[name], targets)
    return tuple(name for name in whole if name.endswith(tuple(wanted)))


def _check_saved(end: str, name: str, module: nn.Module, targets: Targets) -> None:
    if name in targets.layers:
        remedy = "Leave it to one of target_modules and modules_to_save."
        raise LuthierError(
            "recipe-conflict", "it is adapted as well", where="modules_to_save", found=end, remedy=remedy
        )
    parts = [part for part, child in module.named_modules() if part and _can_train(child)]
    if not _can_train(module):
        remedy = f"Name its parts: {', '.join(dict.fromkeys(parts))}." if parts else "Name a module with plain weights."
        problem = f"{name} is a {type(module).__name__}, which cannot train as a whole"
        raise LuthierError("model-target", problem, where="modules_to_save", found=end, remedy=remedy)


def _can_train(module: nn.Module) -> bool:
    """Return True if a module has no parts, and its weights are numbers, not codes."""
    weights = list(module.parameters(recurse=False))
    plain = all(w.is_floating_point() and w.element_size() > 1 for w in weights)
    return bool(weights) and plain and not any(True for _ in module.children())
