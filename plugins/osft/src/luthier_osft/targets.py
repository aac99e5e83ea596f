"""Choose the layers to decompose: all, or those that the patterns match."""

from __future__ import annotations

import difflib
import re
from typing import Any

from luthier import LuthierError, get_logger

from luthier_osft import Osft
from luthier_osft.layers import count_features

log = get_logger()


def find_layers(model: Any, options: Osft) -> list[str]:
    """Return the names of the target layers. Raises `model-target` if a pattern matches none, or only the head.

    Heads, routers and gates of experts are never chosen.
    """
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if name and count_features(module)}
    heads = [name for name, module in layers.items() if module is head]
    usable = [n for n in layers if n not in heads and not n.endswith((".gate", ".router"))]
    if options.target_patterns is None:
        chosen = usable
    else:
        matches = [_matching(pattern, usable, heads, options) for pattern in options.target_patterns]
        chosen = [name for name in usable if any(name in names for names in matches)]
    if not chosen:
        remedy = "Name linear layers, or leave it out for all."
        problem = "no layer is left to decompose"
        raise LuthierError("model-target", problem, where="target_patterns", found=chosen, remedy=remedy)
    _refuse_shared(model, set(chosen))
    _report(chosen)
    return chosen


def _matching(pattern: str, usable: list[str], heads: list[str], options: Osft) -> list[str]:
    """Return the names that one pattern matches."""
    if options.match == "regex":
        try:
            expression = re.compile(pattern)
        except re.error as error:
            problem = f"not a regular expression: {error}"
            raise LuthierError("recipe-wrong-type", problem, where="target_patterns", found=pattern) from None
        wanted = expression.search
    else:
        wanted = lambda name: pattern in name  # type: ignore[assignment]  # noqa: E731
    matches = [name for name in usable if wanted(name)]
    if matches:
        return matches
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in usable))
    near = difflib.get_close_matches(pattern, ends, 3, 0.5) or ends
    problem = "it matches no layer"
    if any(wanted(name) for name in heads):
        problem = "it matches only the head, which is never decomposed"
    remedy = f"Choose of: {', '.join(near[:12])}."
    if options.match == "substring" and re.search(r"[*|()\[\]^$\\]", pattern):
        remedy += " For a regular expression set match: regex."
    raise LuthierError("model-target", problem, where="target_patterns", found=pattern, remedy=remedy)


def _report(chosen: list[str]) -> None:
    """Log which layers are decomposed."""
    counts: dict[str, int] = {}
    for name in chosen:
        end = name.rpartition(".")[2]
        counts[end] = counts.get(end, 0) + 1
    log.info("osft targets", matched=counts, layers=len(chosen))


def _refuse_shared(model: Any, chosen: set[str]) -> None:
    """Raise `part-unsupported` for a module in two places, which would be replaced in one of them only."""
    places = {id(model.get_submodule(name)): name for name in chosen}
    for name, module in model.named_modules(remove_duplicate=False):
        if places.get(id(module), name) != name:
            problem = f"{places[id(module)]} and {name} are the same module"
            raise LuthierError("part-unsupported", problem, where="target_patterns", remedy="Leave it out.")
