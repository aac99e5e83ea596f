"""Check the names in the options, before PEFT changes anything."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, Final

from luthier import LuthierError
from torch import nn

ALL_LINEAR: Final = "all-linear"
NAMED: Final = ("target_modules", "feedforward_modules", "modules_to_save", "exclude_modules")


def check_targets(model: nn.Module, config: Any, where: str) -> None:
    """Raise `model-target` with near misses. PEFT ignores a name without a match if another one matches."""
    modules = [name for name, _ in model.named_modules() if name]
    for field in NAMED:
        _check(getattr(config, field, None), modules, f"{where}.{field}", _adaptable(model))
    _check_named(config, where, _adaptable(model))
    parameters = [name for name, _ in model.named_parameters()]
    _check(getattr(config, "target_parameters", None), parameters, f"{where}.target_parameters", parameters)


def _check_named(config: Any, where: str, candidates: list[str]) -> None:
    """Raise `train-nothing` if `target_modules` is empty, and no parameters are named in its place."""
    wanted = getattr(config, "target_modules", None)
    if wanted is not None and not wanted and not getattr(config, "target_parameters", None):
        remedy = f"Name some of {', '.join(_endings(candidates))}; or {ALL_LINEAR}."
        found = wanted if isinstance(wanted, str) else []
        raise LuthierError("train-nothing", "the adapter targets no module", where=f"{where}.target_modules",
                           found=found, remedy=remedy)  # fmt: skip


def refuse_head_alone(head: str | None, targets: Iterable[str], where: str) -> None:
    """Raise `model-target` if the module named `head` is the only one that PEFT has adapted."""
    if head is not None and set(targets) == {head}:
        problem = "it matches only the head, so that no hidden layer would learn"
        remedy = f"Add hidden layers, such as {ALL_LINEAR}, or train the head as a whole with `modules`."
        raise LuthierError("model-target", problem, where=f"{where}.target_modules", found=head, remedy=remedy)


def check_rank(model: nn.Module, targets: Iterable[str], rank: float | None, where: str) -> None:
    """Raise `recipe-out-of-range` if the rank is above the sizes of all layers that PEFT has adapted.

    A float is a share of the size, from 0 to 1; PEFT would cut a larger one to an integer.
    """
    if rank is None or (isinstance(rank, float) and 0 <= rank <= 1):
        return
    if isinstance(rank, float):
        remedy = "Give a share from 0 to 1, or an integer."
        raise LuthierError("recipe-out-of-range", "it is no share of a size", where=where, found=rank, remedy=remedy)
    weights = {name: getattr(model.get_submodule(name), "weight", None) for name in targets}
    sizes = {name: list(weight.shape) for name, weight in weights.items() if weight is not None and weight.dim() == 2}
    if sizes and rank > max(min(shape) for shape in sizes.values()):
        widest = max(sizes, key=lambda name: min(sizes[name]))
        problem = f"no layer can have this rank: the widest, {widest}, is {sizes[widest]}"
        remedy = f"At most {min(sizes[widest])} is possible."
        raise LuthierError("recipe-out-of-range", problem, where=where, found=rank, remedy=remedy)


def check_start(options: Any, where: str) -> None:
    """Raise `recipe-conflict` for an HRA that would begin with 0 / 0.

    PEFT draws its vectors in equal pairs, and `apply_GS` divides what is left of the second by its norm.
    """
    if options.method == "hra" and options.apply_GS and options.init_weights and options.r % 2 == 0:
        problem, remedy = (
            "the vectors of its start are equal in pairs, which cannot be made orthogonal",
            "Set init_weights: false.",
        )
        raise LuthierError("recipe-conflict", problem, where=f"{where}.apply_GS", remedy=remedy)


def name_head(model: Any) -> str | None:
    """Return the name of the head in the model, or None if it has none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def no_default(model: nn.Module, where: str) -> LuthierError:
    """Return the error for a model for which PEFT has no default targets."""
    kinds = ", ".join(_endings(_adaptable(model)))
    problem = f"PEFT has no default for this method on a {getattr(model.config, 'model_type', 'model of this kind')}"
    remedy = f"Name target_modules: some of {kinds}; or {ALL_LINEAR}."
    return LuthierError("model-target", problem, where=f"{where}.target_modules", remedy=remedy)


def _check(wanted: str | Iterable[str] | None, names: list[str], where: str, candidates: list[str]) -> None:
    if not wanted or wanted == ALL_LINEAR:
        return
    if isinstance(wanted, str):
        if not any(_full_match(wanted, name, where) for name in names):
            raise _no_pattern_match(wanted, where, candidates)
        return
    for ending in sorted(wanted):
        if not any(name == ending or name.endswith(f".{ending}") for name in names):
            raise _no_match(ending, where, candidates)


def _full_match(pattern: str, name: str, where: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        problem = f"not a regular expression: {error}"
        remedy = "Correct the expression, or give a list of names."
        raise LuthierError("recipe-out-of-range", problem, where=where, found=pattern, remedy=remedy) from None


def _no_match(wanted: str, where: str, candidates: list[str]) -> LuthierError:
    endings = _endings(candidates)
    near = difflib.get_close_matches(wanted.rpartition(".")[2], endings, n=3, cutoff=0.5)
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"The model has {', '.join(endings)}."
    return LuthierError("model-target", "it matches nothing in the model", where=where, found=wanted, remedy=remedy)


def _no_pattern_match(pattern: str, where: str, candidates: list[str]) -> LuthierError:
    """Return the error for a string, which PEFT reads as a pattern even if it is the end of a name."""
    if pattern not in _endings(candidates):
        return _no_match(pattern, where, candidates)
    problem = "as a regular expression it matches no whole name of a module"
    remedy = f"Write a list, [{pattern}], or .*{pattern}."
    return LuthierError("model-target", problem, where=where, found=pattern, remedy=remedy)


def _adaptable(model: nn.Module) -> list[str]:
    """Return the modules that have weights of their own."""
    return [name for name, module in model.named_modules() if name and any(True for _ in module.parameters(False))]


def _endings(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
