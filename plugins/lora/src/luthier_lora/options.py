"""The options of `lora` and `dora`, under PEFT's names."""

from __future__ import annotations

import attrs
from luthier import option

TARGETS = (
    "Layers, by the end of their name (a list), by a regular expression for the whole name (a string), or "
    "`all-linear`: all but the head, routers and experts; none: the query and value projections, or what the model "
    "has in their place; []: no layer."
)


@attrs.frozen(kw_only=True)
class LowRank:
    """What `lora` and `dora` have in common."""

    r: int = option(8, help="Rank of the update.", low=1)
    lora_alpha: int = option(16, help="The update is scaled by lora_alpha / r.", low=1)
    lora_dropout: float = option(0.05, help="Share of an update's inputs that training drops.", low=0.0, high=0.99)
    target_modules: str | list[str] | None = option(None, help=TARGETS)
    exclude_modules: str | list[str] | None = option(
        None, help="Layers to leave out, by the end of their name (a list) or by a regular expression (a string)."
    )
    use_rslora: bool = option(False, help="Scale by lora_alpha / sqrt(r) instead: rank-stabilised LoRA.")
    init_lora_weights: bool = option(
        True, help="Begin with an update of zero; false: with a random one, which changes the model before training."
    )


@attrs.frozen(kw_only=True)
class Lora(LowRank):
    """`adapter: {name: lora, r: 8, ...}`"""

    target_parameters: list[str] | None = option(
        None,
        help="Weights that are no layer of their own, such as a mixture's experts, by the end of their name: "
        "`mlp.experts.down_proj`. Needs lora_dropout: 0.",
    )


@attrs.frozen(kw_only=True)
class Dora(LowRank):
    """`adapter: {name: dora, r: 8, ...}`"""
