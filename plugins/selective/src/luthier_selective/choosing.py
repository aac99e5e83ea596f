"""Choose the parameters that the options name, with errors that show near misses."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from luthier import LuthierError
from torch import nn

from luthier_selective import BitFit, Modules


def choose_parameters(model: Any, options: BitFit | Modules) -> list[str]:
    """Return the full names of the parameters that train as a whole, in the model's order.

    Raises `train-nothing` for an empty list, `model-target` for a pattern that matches nothing or weights of codes.
    """
    _refuse_empty(options)
    chosen = _biases(model, options) if isinstance(options, BitFit) else _of_modules(model, options)
    parameters = dict(model.named_parameters())
    for name in chosen:
        if not is_plain(parameters[name]):
            problem = f"{name} is {parameters[name].dtype}: a quantized weight, which cannot train"
            remedy = "Set quantizer: none, or choose other modules."
            raise LuthierError("model-target", problem, where="target_modules", remedy=remedy)
    return [name for name in parameters if name in chosen]


def _refuse_empty(options: BitFit | Modules) -> None:
    """Raise `train-nothing` for an empty list, because without it something else would train than the user meant."""
    for field in ("target_modules", "token_ids"):
        value = getattr(options, field, None)
        if value is not None and not value:
            remedy = "Name something, or leave it out."
            raise LuthierError("train-nothing", "nothing is named", where=field, found=value, remedy=remedy)


def is_plain(parameter: nn.Parameter) -> bool:
    """Return True if a parameter holds numbers, not codes."""
    return parameter.is_floating_point() and parameter.element_size() > 1


def _biases(model: Any, options: BitFit) -> set[str]:
    places = _named(model, options.target_modules) if options.target_modules else [n for n, _ in model.named_modules()]
    biases = {f"{name}.bias" for name in places if model.get_submodule(name)._parameters.get("bias") is not None}
    if not biases:
        kind, limited = type(model).__name__, options.target_modules is not None
        problem = "none of these modules has a bias" if limited else f"{kind} has no bias to train"
        remedy = "Choose `modules` with norms: true, or `lora`."
        raise LuthierError("model-target", problem, where="target_modules" if limited else "adapter", remedy=remedy)
    return biases


def _of_modules(model: Any, options: Modules) -> set[str]:
    places = _named(model, options.target_modules) if options.target_modules else []
    others = bool(places or options.embeddings or options.token_ids)
    if options.norms or (options.norms is None and not others):
        norms = [name for name, module in model.named_modules() if is_norm(module)]
        if not norms:
            raise LuthierError(
                "model-target", f"{type(model).__name__} has no norm", where="norms", found=options.norms
            )
        places += norms
    if options.embeddings:
        both = (model.get_input_embeddings(), model.get_output_embeddings())
        places += [name for name, module in model.named_modules() if any(module is one for one in both)]
    if not places and not others:
        remedy = "Set target_modules, norms, embeddings or token_ids."
        raise LuthierError("train-nothing", "the options choose nothing", where="adapter", remedy=remedy)
    chosen = {id(p) for name in places for p in model.get_submodule(name).parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}  # a tied weight once


def is_norm(module: nn.Module) -> bool:
    """Return True if a module multiplies its input by a vector, as all norms do."""
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def _named(model: Any, wanted: str | list[str]) -> list[str]:
    """Return the names of modules with parameters that a pattern matches."""
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    if isinstance(wanted, str):
        try:
            matches = [name for name in names if re.fullmatch(wanted, name)]
        except re.error as error:
            problem = f"not a regular expression: {error}"
            raise LuthierError("recipe-wrong-type", problem, where="target_modules", found=wanted) from None
        if not matches:
            raise _unmatched(wanted, names)
        return matches
    for end in wanted:
        if not any(_ends(name, end) for name in names):
            raise _unmatched(end, names)
    return [name for name in names if any(_ends(name, end) for end in wanted)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _unmatched(pattern: str, names: Iterable[str]) -> LuthierError:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = [hit for word in re.findall(r"\w+", pattern) for hit in difflib.get_close_matches(word, ends, 3, 0.5)]
    shown = ", ".join(dict.fromkeys(near or ends[:12]))
    remedy = f"{'Near misses' if near else 'The model has'}: {shown}."
    return LuthierError("model-target", "it matches no module", where="target_modules", found=pattern, remedy=remedy)
