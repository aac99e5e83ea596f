"""What luthier-prompt offers, `prompt_tuning`, `prefix_tuning` and `p_tuning_v2`, described without importing torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import attrs
from luthier import AdapterRecord, LuthierError, hookimpl, option

__all__ = ["PTuningV2", "PrefixTuning", "PromptTuning", "luthier_adapters", "options_of"]

COUNT = "Number of virtual tokens before each document; they count in max_tokens_per_device and the model's positions."


@attrs.frozen(kw_only=True)
class PromptTuning:
    """`adapter: {name: prompt_tuning, num_virtual_tokens: 20}`"""

    num_virtual_tokens: int = option(20, help=COUNT, low=1)
    init: Literal["vocab", "random", "text"] = option(
        "vocab",
        help="Begin with the embeddings of tokens drawn from the vocabulary, with normal numbers of their size, or "
        "with the tokens of init_text.",
    )
    init_text: str | None = option(
        None, help="The text to begin with; its tokens are repeated, or cut, to num_virtual_tokens."
    )

    def __attrs_post_init__(self) -> None:
        if (self.init == "text") != (self.init_text is not None):
            problem = "init: text and init_text go together"
            remedy = "Give init_text, such as the task in words." if self.init == "text" else "Set init: text."
            raise LuthierError("recipe-conflict", problem, where="PromptTuning.init", found=self.init, remedy=remedy)
        if self.init_text is not None and not self.init_text.strip():
            problem, remedy = "there is no word in it", "Give the task in words."
            raise LuthierError("recipe-out-of-range", problem, where="PromptTuning.init_text", found=self.init_text,
                               remedy=remedy)  # fmt: skip


@attrs.frozen(kw_only=True)
class PrefixTuning:
    """`adapter: {name: prefix_tuning, num_virtual_tokens: 20}`"""

    num_virtual_tokens: int = option(20, help=COUNT, low=1)
    init_weights: Literal["normal", "zero"] = option(
        "normal", help="Begin with normally distributed numbers of deviation init_std, or with zeros."
    )
    init_std: float = option(0.1, help="Standard deviation of the initial keys and values.", low=0.0)


@attrs.frozen(kw_only=True)
class PTuningV2(PrefixTuning):
    """`adapter: {name: p_tuning_v2, num_virtual_tokens: 20}`"""

    prefix_projection: bool = option(
        True, help="Train embeddings, and two layers that map them to keys and values; only the result is saved."
    )
    encoder_hidden_size: int | None = option(
        None, help="Width between the two layers; none: the width of one layer's keys.", low=1
    )


def options_of(folder: str | Path) -> PromptTuning | PrefixTuning:
    """Return the options with which the adapter in this folder, ours or PEFT's, can be attached and loaded."""
    from luthier_prompt.files import read_options

    return read_options(Path(folder))


@hookimpl
def luthier_adapters() -> list[AdapterRecord]:
    """Return the three adapters. None begins as the identity, and none can be merged into weights."""
    return [
        _record(
            "prompt_tuning", "Trained embeddings before each document, in PEFT's files.", PromptTuning, "PromptAdapter"
        ),
        _record(
            "prefix_tuning", "Trained keys and values in every layer, in PEFT's files.", PrefixTuning, "PrefixAdapter"
        ),
        _record(
            "p_tuning_v2",
            "Prefix tuning through an encoder, of which only the result is saved (P-tuning v2), in PEFT's files.",
            PTuningV2,
            "PrefixAdapter",
        ),
    ]


def _record(name: str, summary: str, options: type, part: str) -> AdapterRecord:
    return AdapterRecord(
        name=name,
        summary=summary,
        options=options,
        build=f"luthier_prompt.adapters:{part}",
        provides="reference",
        conflicts="rounded-activations",  # rounded codes can differ between packed and separate documents
        mergeable=False,
        tolerance=float("inf"),
    )
