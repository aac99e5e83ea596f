"""Config limits: what a model's config must not ask for, checked before anything is built of it."""

from __future__ import annotations

from typing import Any, Final

from luthier.errors import LuthierError, show_value
from luthier.model.foreign import explain_reading
from luthier.model.weights.stored_layers import prepare_library

LIMITS: Final = {  # the largest values that are accepted: beyond every model, so that a typing error ends at once
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "head_dim": 2**16,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "num_local_experts": 2**16,
    "num_experts": 2**16,
    "n_routed_experts": 2**16,
}
CODE: Final = ("_attn_implementation", "_experts_implementation")  # entries by which a config may name code on the hub


def check_config(config: Any, source: str) -> None:
    """Raise `model-not-found` for a size beyond `LIMITS`, a kernel on the hub, or a quantizer that is not here."""
    text = config.get_text_config()
    for name, most in LIMITS.items():
        size = getattr(text, name, None)
        if isinstance(size, int) and not 1 <= size <= most:
            problem, remedy = f"no {name} of a model, which is from 1 to {most:,}", "Correct the model's config.json."
            raise LuthierError("model-not-found", problem, where=f"{source}: {name}", found=size, remedy=remedy)
    for part in {id(part): part for part in (config, text)}.values():
        _refuse_kernels(part, source)
    _check_quantization(config, source)


def _refuse_kernels(config: Any, source: str) -> None:
    """Raise where a config names code that transformers would fetch from the hub and run."""
    for name in CODE:
        asked = getattr(config, name, None)
        if isinstance(asked, str) and "/" in asked:
            problem = f"the config names code on the hub, {show_value(asked)}, which Luthier neither fetches nor runs"
            remedy = f"Take {name.removeprefix('_')} out of the model's config.json."
            raise LuthierError("model-not-found", problem, where=source, remedy=remedy)


def _check_quantization(config: Any, source: str) -> None:
    """Raise where the weights are quantized in a form whose library is not here."""
    asked = getattr(config, "quantization_config", None)
    if asked is None:
        return
    from transformers.quantizers import AutoHfQuantizer

    remedy = "Install what is named, or take the model before it was quantized, with one of Luthier's quantizers."
    with explain_reading(f"{source}: quantization_config", remedy=remedy):
        prepare_library(asked)
        AutoHfQuantizer.from_config(asked, pre_quantized=True).validate_environment(device_map=None)
