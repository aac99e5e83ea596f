"""Which layers an adapter takes: PEFT's matching, our defaults, and errors that show near misses."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import attrs
from torch import nn

from luthier import LuthierError
from luthier_lora.layers import features
from luthier_lora.options import Dora, Lora

ALL_LINEAR = "all-linear"

# query and value projections, then what stands in their place where projections are fused or latent
DEFAULTS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("q_lin", "v_lin"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
    ("q_proj", "kv_b_proj"),
    ("q_b_proj", "kv_b_proj"),
)


@attrs.frozen(kw_only=True)
class Targets:
    """Full names of the layers and (module, parameter) of the weights that carry an update."""

    layers: tuple[str, ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()


def find_targets(model: Any, options: Lora | Dora) -> Targets:
    """What the options name in this model."""
    layers = [name for name, module in model.named_modules() if name and features(module)]
    wanted = options.target_modules
    if wanted is None:
        wanted = default_names(layers)
    elif isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        wanted = [name for name in layers if not _is_special(model, name)]
    chosen = [
        n for n, _ in model.named_modules() if n and matches(wanted, n) and not matches(options.exclude_modules, n)
    ]
    if not chosen and wanted != []:
        raise unmatched("target_modules", wanted, layers)
    for name in chosen:
        if name not in layers:
            raise _unwrappable(name, model.get_submodule(name))
    return Targets(layers=tuple(chosen))


def matches(pattern: str | Iterable[str] | None, name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their dotted ends."""
    if not pattern:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in pattern)


def default_names(layers: list[str]) -> list[str]:
    ends = {name.rpartition(".")[2] for name in layers}
    for names in DEFAULTS:
        if ends.issuperset(names):
            return list(names)
    raise unmatched("target_modules", ["q_proj", "v_proj"], layers)


def unmatched(option: str, wanted: str | Iterable[str], known: list[str]) -> LuthierError:
    """`model-target` with the names that come nearest, whole or by their last part."""
    ends = sorted({name.rpartition(".")[2] for name in known})
    near = []
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        near += difflib.get_close_matches(pattern, ends, n=3, cutoff=0.4)
    shown = ", ".join(dict.fromkeys(near or ends))
    return LuthierError(
        "model-target",
        "matches no layer of this model",
        where=option,
        found=wanted,
        remedy=f"{'Near' if near else 'It has'}: {shown}.",
    )


def _is_special(model: Any, name: str) -> bool:
    return model.get_submodule(name) is model.get_output_embeddings()


def _unwrappable(name: str, module: nn.Module) -> LuthierError:
    return LuthierError(
        "model-target",
        f"{name} is a {type(module).__name__}, which has no weight matrix to update",
        where="target_modules",
        remedy="Target layers only, such as q_proj.",
    )
