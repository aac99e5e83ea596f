"""Choose the weights to adapt: PEFT's matching, equivalents of q and v, and errors with near misses."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs
from luthier import LuthierError
from torch import nn

from luthier_lora.layers import features
from luthier_lora.options import Dora, Lora

ALL_LINEAR: Final = "all-linear"

# The query and value projections, then their equivalents in models that fuse them or use a latent space.
DEFAULTS: Final = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
    ("q_proj", "kv_b_proj"),
    ("q_b_proj", "kv_b_proj"),
)


@attrs.frozen(kw_only=True)
class Targets:
    """The full names of the layers, and (module, parameter) of the weights that are not layers."""

    layers: tuple[str, ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()

    @property
    def modules(self) -> list[str]:
        """Return the names of the modules whose ranks and scales a pattern can choose."""
        return [*self.layers, *(module for module, _ in self.parameters)]

    @property
    def names(self) -> list[str]:
        return [*self.layers, *(f"{module}.{parameter}" for module, parameter in self.parameters)]


def find_targets(model: Any, options: Lora | Dora) -> Targets:
    """Return what the options name in this model. Raises `model-target` if a pattern matches nothing."""
    layers = [name for name, module in model.named_modules() if name and features(module)]
    chosen = _chosen(model, layers, options.target_modules)
    left = _without(options.exclude_modules, chosen, layers)
    if chosen and not left:
        raise unmatched("exclude_modules", options.exclude_modules, chosen, "leaves no target")
    wanted = (options.target_parameters if isinstance(options, Lora) else None) or []
    parameters = _parameters(model, wanted)
    inside = [f"{module}.{name}" for module, name in parameters if module in left]
    if inside:
        remedy = "Leave it to one of target_modules and target_parameters."
        raise LuthierError(
            "recipe-conflict", "it is targeted as a layer and as a parameter", found=inside[0], remedy=remedy
        )
    if not left and not parameters:
        problem = "the adapter targets no weight"
        raise LuthierError("train-nothing", problem, where="target_modules", found=options.target_modules)
    _refuse_shared(model, {*left, *(module for module, _ in parameters)})
    return Targets(layers=tuple(left), parameters=tuple(parameters))


def refuse_head_alone(model: Any, targets: Targets) -> None:
    """Raise `model-target` if the head is the only target: all hidden layers would stay as they are."""
    head = model.get_output_embeddings()
    if head is not None and all(model.get_submodule(name) is head for name in targets.modules):
        option = "target_modules" if targets.layers else "target_parameters"
        problem = "it matches only the head, so that no hidden layer would learn"
        remedy = f"Add hidden layers, such as {ALL_LINEAR}, or train the head as a whole with `modules`."
        raise LuthierError("model-target", problem, where=option, found=targets.names[0], remedy=remedy)


def matches(pattern: str | Iterable[str] | None, name: str) -> bool:
    """Return True by PEFT's rule: a string is a regular expression for the whole name, a list has ends of names."""
    if not pattern:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in pattern)


def default_names(layers: Sequence[str]) -> list[str]:
    """Return the ends of names of q and v, or of their equivalents, in a model with these layers."""
    ends = {name.rpartition(".")[2] for name in layers}
    for names in DEFAULTS:
        if ends.issuperset(names):
            return list(names)
    raise unmatched("target_modules", ["q_proj", "v_proj"], layers)


def all_linear(model: Any, layers: Sequence[str]) -> list[str]:
    """Return every layer except heads, routers and experts."""
    head, has_body = model.get_output_embeddings(), model.base_model is not model
    return [
        name
        for name in layers
        if model.get_submodule(name) is not head
        and not (has_body and "." not in name)  # outside the body there are only heads, such as `score`
        and not is_sparse(model, name)
    ]


def is_sparse(model: Any, name: str) -> bool:
    """Return True if a module is an expert, part of one, or the router of experts."""
    parts = name.split(".")
    if any("expert" in part or "router" in part for part in parts):
        return True
    owners = [i for i, part in enumerate(parts) if "gate" in part]
    return any(_has_experts(model.get_submodule(".".join(parts[:i]))) for i in owners)


def unmatched(
    option: str, pattern: object, known: Sequence[str], problem: str = "matches nothing here"
) -> LuthierError:
    """Return `model-target` with the nearest names, compared by their last part, or two parts of parameters."""
    num_parts = 2 if option == "target_parameters" else 1
    ends = list(dict.fromkeys(".".join(name.split(".")[-num_parts:]) for name in known))
    words = {part for end in ends for part in end.split(".")}
    hits = {hit for word in re.findall(r"\w+", str(pattern)) for hit in difflib.get_close_matches(word, words, 3, 0.5)}
    near = [end for end in ends if hits & set(end.split("."))]
    shown = ", ".join((near or ends)[:12]) or "nothing that an update could be added to"
    remedy = f"{'Near misses' if near else 'The model has'}: {shown}."
    if isinstance(pattern, str) and difflib.get_close_matches(pattern.lower(), [ALL_LINEAR], cutoff=0.8):
        remedy = f"Did you mean {ALL_LINEAR!r}?"
    return LuthierError("model-target", problem, where=option, found=pattern, remedy=remedy)


def _chosen(model: Any, layers: list[str], wanted: str | list[str] | None) -> list[str]:
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return all_linear(model, layers)
    if isinstance(wanted, str):
        return _matching("target_modules", wanted, layers)
    modules = [name for name, _ in model.named_modules() if name]
    wanted = default_names(layers) if wanted is None else wanted
    for end in wanted:
        hits = [name for name in modules if matches([end], name)]
        wrong = [name for name in hits if name not in layers]
        if not hits:
            raise unmatched("target_modules", end, layers)
        if wrong:
            raise _unwrappable(end, model.get_submodule(wrong[0]), wrong[0], layers)
    return [name for name in layers if matches(wanted, name)]


def _without(excluded: str | list[str] | None, chosen: list[str], layers: list[str]) -> list[str]:
    if isinstance(excluded, str):
        _matching("exclude_modules", excluded, layers)
    for end in [] if excluded is None or isinstance(excluded, str) else excluded:
        _matching("exclude_modules", [end], layers)
    return [name for name in chosen if not matches(excluded, name)]


def _matching(option: str, pattern: str | list[str], names: list[str]) -> list[str]:
    try:
        hits = [name for name in names if matches(pattern, name)]
    except re.error as error:
        problem = f"not a regular expression: {error}"
        raise LuthierError("recipe-wrong-type", problem, where=option, found=pattern) from None
    if not hits and isinstance(pattern, str) and any(matches([pattern], name) for name in names):
        remedy = f"For the end of a name write a list: [{pattern}]."
        problem = "this regular expression for the whole name matches no layer"
        raise LuthierError("model-target", problem, where=option, found=pattern, remedy=remedy)
    if not hits:
        raise unmatched(option, pattern if isinstance(pattern, str) else pattern[0], names)
    return hits


def _parameters(model: Any, wanted: list[str]) -> list[tuple[str, str]]:
    """Return (module, parameter) in the order in which PEFT nests their wrappers."""
    owned = [
        (module, name)
        for module, owner in model.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if module and parameter.dim() in (2, 3) and parameter.is_floating_point()
    ]
    names = [f"{module}.{name}" for module, name in owned]
    for end in wanted:
        _matching("target_parameters", [end], names)
    return [pair for pair, name in zip(owned, names, strict=True) if matches(wanted, name)]


def _refuse_shared(model: Any, chosen: set[str]) -> None:
    """Raise `part-unsupported` for a module in two places, which would be wrapped in one of them only."""
    places = {id(model.get_submodule(name)): name for name in chosen}
    for name, module in model.named_modules(remove_duplicate=False):
        if places.get(id(module), name) != name:
            problem = f"{places[id(module)]} and {name} are the same module, so an update cannot distinguish them"
            raise LuthierError("part-unsupported", problem, remedy="Leave it out with exclude_modules.")


def _has_experts(module: nn.Module) -> bool:
    return any("expert" in name for name, _ in module.named_children())


def _unwrappable(end: str, module: nn.Module, name: str, layers: list[str]) -> LuthierError:
    within = dict.fromkeys(layer.rpartition(".")[2] for layer in layers if layer.startswith(f"{name}."))
    stacked = [weight for weight, parameter in module.named_parameters() if parameter.dim() == 3]
    remedy = f"Layers inside it: {', '.join(within)}." if within else "Target linear layers."
    if stacked:
        remedy = f"Name weights of experts in target_parameters: {', '.join(stacked)}."
    problem = f"{name} is a {type(module).__name__}, not a layer with one weight matrix"
    return LuthierError("model-target", problem, where="target_modules", found=end, remedy=remedy)
