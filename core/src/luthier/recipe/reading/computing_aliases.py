"""Other tools' names for settings of computation: precision, recomputation, device, rates by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from luthier.errors import LuthierError

Reading = Callable[[Any], dict[str, Any]]
CHECKPOINTING: Final = "gradient_checkpointing"
QUANTIZED: Final = {"qlora": "lora", "qdora": "dora"}  # adapters that imply quantizer nf4


def _choice(alias: str, choices: Mapping[Any, dict[str, Any]]) -> Reading:
    """Return a reader of a few known values."""

    def read(value: Any) -> dict[str, Any]:
        for known, meant in choices.items():
            if value == known and type(value) is type(known):
                return meant
        words = ", ".join(str(known).lower() for known in choices)
        raise LuthierError("recipe-wrong-type", f"expected one of: {words}", where=alias, found=value)

    return read


def _precision(name: str) -> dict[str, Any]:
    return {"precision": name}


def _recomputed(mode: bool | str) -> dict[str, Any]:
    return {CHECKPOINTING: mode}


def _plus(value: Any) -> dict[str, Any]:
    """Return the settings of LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns `value` times as fast as A."""
    return {"lr_multipliers": {r"\.lora_B\.": value}}


def _reentrant(value: Any) -> dict[str, Any]:
    """Accept the one option of transformers' checkpointing that is in use. It changes no gradient."""
    if not isinstance(value, Mapping) or set(value) - {"use_reentrant"}:
        where = f"{CHECKPOINTING}_kwargs"
        raise LuthierError("recipe-unknown-option", "only use_reentrant is known", where=where, found=value,
                           remedy=f"Leave it out: {CHECKPOINTING} alone says what is recomputed.")  # fmt: skip
    return {}


BF16: Final = {True: _precision("bf16"), False: _precision("float32"), "auto": _precision("auto"),
               "full": _precision("pure_bf16")}  # fmt: skip
MIXED: Final = {"bf16": _precision("bf16"), "fp16": _precision("fp16"), "no": _precision("float32")}
ON: Final = {True: _recomputed(True), False: _recomputed(False)}
# `auto` never chooses fp16, so that `fp16: false` changes nothing.
CHOICES: Final[dict[str, Mapping[Any, dict[str, Any]]]] = {
    "bf16": BF16,
    "fp16": {True: _precision("fp16"), False: {}},
    "float16": {True: _precision("fp16"), False: {}},
    "bfloat16": {True: _precision("pure_bf16"), False: {}},
    "pure_bf16": {True: _precision("pure_bf16"), False: {}},
    "mixed_precision": MIXED,
    "use_gradient_checkpointing": {**ON, "unsloth": _recomputed("offload")},
    "disable_gradient_checkpointing": {True: _recomputed(False), False: _recomputed(True)},
    "enable_activation_checkpointing": ON,
    "activation_checkpointing": ON,
    "enable_activation_offloading": {True: _recomputed("offload"), False: {}},
    "activation_offloading": {True: _recomputed("offload"), False: {}},
    "use_cpu": {True: {"device": "cpu"}, False: {}},
    "no_cuda": {True: {"device": "cpu"}, False: {}},
}
COMPUTING: Final[dict[str, Reading]] = {
    **{alias: _choice(alias, choices) for alias, choices in CHOICES.items()},
    "gradient_checkpointing_kwargs": _reentrant,
    "loraplus_lr_ratio": _plus,
}
