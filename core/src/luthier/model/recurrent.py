"""Models whose layers carry state across positions: of packed documents, one would run into the next."""

from __future__ import annotations

import re
from typing import Any, Final

from torch import nn

from luthier.logs import get_logger
from luthier.runs.writing.decisions import Decisions

log = get_logger()
LAYERS: Final = (  # transformers' names of layers with a state besides, or instead of, keys and values
    "linear_attention",
    "hybrid",
    "hybrid_sliding",
    "conv",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "mamba",
    "recurrent",
)
MODULES: Final = re.compile(r"Mamba|SSM|RWKV|Rwkv|xLSTM|mLSTM|sLSTM|DeltaNet|LinearAttention|LightningAttention|"
                            r"Retention|Recurrent|ShortConv|Hyena")  # fmt: skip


def state_of(config: Any, model: nn.Module | None = None) -> str | None:
    """Return what in a model carries state across positions, in words; None where only attention looks back.

    Found by the names of layers in its config, by what transformers says of its class, and, of a model in memory, by
    its modules: recurrent ones, causal convolutions, and those named after such a mechanism.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = sorted(set(LAYERS) & set(getattr(text, "layer_types", None) or ()))
    if kinds:
        return f"{', '.join(kinds)} layers"
    if getattr(type(model) if model is not None else _class_of(config), "_is_stateful", False):
        return f"the architecture {config.model_type}"
    return next((mechanism for module in model.modules() if (mechanism := _carries(module))), None) if model else None


def separation_reason(config: Any, model: nn.Module | None = None) -> str | None:
    """Return why this model's documents cannot share one pass, as a clause; None where they can."""
    state = state_of(config, model)
    if state is not None:
        return f"{state} carry state across positions"
    if takes_attention(type(model) if model is not None else _class_of(config)):
        return None
    return f"{config.model_type} computes attention by itself, and cannot be told of documents"


def takes_attention(kind: type[nn.Module] | None) -> bool:
    """Return whether a transformers class computes attention by a function that it is given; True where unknown."""
    return getattr(kind, "_supports_attention_backend", True)


def decide_packing(reason: str | None, decisions: Decisions) -> bool:
    """Return whether documents share a pass: not where there is a `separation_reason`. It is held on resume."""
    if reason is None:
        return True
    on = decisions.take("packing", lambda: (False, f"{reason}, so that packed documents would run into each other"))
    if not on:
        log.warning("packing is off: one document in each micro-batch", because=reason)
    return on


def _class_of(config: Any) -> Any:
    """Return the causal LM's class for a config, None where transformers has none."""
    import transformers

    return transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)


def _carries(module: nn.Module) -> str | None:
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__} modules"
    if isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1:
        return "convolutions over positions"
    return f"{type(module).__name__} modules" if MODULES.search(type(module).__name__) else None
