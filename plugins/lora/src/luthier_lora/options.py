"""The options of `lora`, `dora` and `adalora`, under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs
from luthier import LuthierError, option

TARGETS = (
    "Layers to adapt: ends of names (a list), a regular expression for the whole name (a string), or `all-linear`: all "
    "except the head, routers and experts; none: the query and value projections, or their equivalents in the model; "
    "[]: no layer."
)
PATTERN = (
    "of single layers, by a regular expression for the end of their name: `{'down_proj': 16}`. The first match counts."
)
DROPPED = (
    "Share of an update's inputs that training drops; none: 0.05, or 0 with target_parameters and with a loss that "
    "compares log-probabilities, such as dpo."
)
BEGINNING = "Begin with an update of zero; false: with a random update, which changes the model before training."
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "quality": {"r": 256, "lora_alpha": 512, "target_modules": "all-linear"},
    "fast": {"r": 16, "lora_alpha": 32, "target_modules": None},
}


class _Preset:
    """The default of a field that a preset may set. Called without an instance, it returns the one without preset."""

    def __init__(self, name: str, otherwise: Any) -> None:
        self.name, self.otherwise = name, otherwise

    def __call__(self, instance: Any = None) -> Any:
        preset = None if instance is None else instance.preset
        return self.otherwise if preset is None else PRESETS[preset][self.name]


def _by_preset(name: str, otherwise: Any) -> Any:
    return attrs.Factory(_Preset(name, otherwise), takes_self=True)


@attrs.frozen(kw_only=True)
class LowRank:
    """The options that `lora` and `dora` share."""

    preset: Literal["quality", "fast"] | None = option(
        None,
        help="quality: r 256, lora_alpha 512, all-linear; fast: r 16, lora_alpha 32, q and v. Options that are given "
        "win. "
        "Both are meant for a learning_rate of 2e-4, ten times that of full fine-tuning.",
    )
    r: int = option(_by_preset("r", 8), help="Rank of the update.", low=1)
    lora_alpha: int = option(_by_preset("lora_alpha", 16), help="The update is scaled by lora_alpha / r.", low=1)
    lora_dropout: float | None = option(None, help=DROPPED, low=0.0, high=0.99)
    target_modules: str | list[str] | None = option(_by_preset("target_modules", None), help=TARGETS)
    exclude_modules: str | list[str] | None = option(
        None, help="Layers to leave out, by the end of their name (a list) or by a regular expression (a string)."
    )
    rank_pattern: dict[str, int] = option(factory=dict, help=f"The rank r {PATTERN}")
    alpha_pattern: dict[str, int] = option(factory=dict, help=f"The lora_alpha {PATTERN}")
    rank_energy: float | None = option(
        None,
        help="Choose the rank of each layer: the number of singular values of its weight that hold this share of their "
        "squares, at most r.",
        low=0.0,
        high=1.0,
    )
    rank_budget: int | None = option(
        None, help="Choose ranks of at most r, so that all A and B together have at most this many parameters.", low=1
    )
    rank_gradient: int | None = option(
        None,
        help="Let rank_energy and rank_budget judge by the gradient of the loss over so many packed batches, in the "
        "place of the weight: ranks go to the layers that the rows would change most.",
        low=1,
    )
    learn_scale: bool = option(
        False, help="Also train a factor of each layer's update, which begins at 1; files contain it in B."
    )
    use_rslora: bool = option(False, help="Scale the update by lora_alpha / sqrt(r): rank-stabilised LoRA.")
    init_lora_weights: bool = option(True, help=BEGINNING)
    bias: Literal["none", "all", "lora_only"] = option(
        "none", help="Biases that also train: all of the model, or those of the adapted layers."
    )
    modules_to_save: list[str] | None = option(
        None,
        help="Modules that train as a whole, by any end of their names, such as `lm_head` or `norm`; they must have no "
        "parts.",
    )
    trainable_token_indices: list[int] | None = option(
        None,
        help="Tokens, by their ids, whose rows of the embedding also train, such as those of new special tokens; in a "
        "tied head too.",
        low=0,
    )
    loraplus_lr_ratio: float = option(
        1.0, help="LoRA+: learning rate of B divided by that of A; its paper recommends 16.", low=0.01, high=1e4
    )

    def __attrs_post_init__(self) -> None:
        if self.rank_gradient is not None and self.rank_energy is None and self.rank_budget is None:
            where, remedy = f"{type(self).__name__}.rank_gradient", "Give rank_budget or rank_energy, or leave it out."
            raise LuthierError("recipe-missing", "no rank is chosen by it", where=where, remedy=remedy)
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, field).items():
                if value < 1:
                    where, remedy = f"{type(self).__name__}.{field}.{pattern}", "Give a number of at least 1."
                    raise LuthierError(
                        "recipe-out-of-range",
                        "the value is outside its bounds",
                        where=where,
                        found=value,
                        remedy=remedy,
                    )


@attrs.frozen(kw_only=True)
class Lora(LowRank):
    """`adapter: {name: lora, r: 8, ...}`"""

    init_lora_weights: bool | Literal["pissa", "loftq"] = option(  # type: ignore[assignment]  # wider than its kin's
        True,
        help=f"{BEGINNING} pissa: A and B begin as the first r singular vectors of each weight, which is left with the "
        "rest (PiSSA); the model computes what it did. loftq: as those of what quantizing took from each weight, so "
        "that the model computes more nearly what it did unquantized (LoftQ); needs a quantizer.",
    )

    target_parameters: list[str] | None = option(
        None,
        help="Weights that are no layer of their own, such as a mixture's experts, by the end of their name: "
        "`mlp.experts.down_proj`. Their updates have no lora_dropout.",
    )


@attrs.frozen(kw_only=True)
class Dora(LowRank):
    """`adapter: {name: dora, r: 8, ...}`"""


@attrs.frozen(kw_only=True)
class AdaLora:
    """`adapter: {name: adalora, init_r: 12, target_r: 8, ...}`"""

    init_r: int = option(12, help="Rank of every update at first.", low=1)
    target_r: int = option(8, help="Mean rank of all updates at the end.", low=1)
    lora_alpha: int = option(16, help="The update is scaled by lora_alpha / init_r.", low=1)
    lora_dropout: float | None = option(None, help=DROPPED, low=0.0, high=0.99)
    target_modules: str | list[str] | None = option(None, help=TARGETS)
    exclude_modules: str | list[str] | None = option(
        None, help="Layers to leave out, by the end of their name (a list) or by a regular expression (a string)."
    )
    tinit: int = option(0, help="Steps at the beginning in which no rank is removed.", low=0)
    tfinal: int = option(0, help="Steps at the end in which no rank is removed.", low=0)
    deltaT: int = option(1, help="Steps between two removals of ranks.", low=1)
    beta1: float = option(0.85, help="Decay of the mean importance.", low=0.0, high=0.9999)
    beta2: float = option(0.85, help="Decay of the mean uncertainty of the importance.", low=0.0, high=0.9999)
    orth_reg_weight: float = option(0.5, help="Weight of the penalty that keeps A and B orthogonal.", low=0.0)

    def __attrs_post_init__(self) -> None:
        if self.target_r > self.init_r:
            problem, remedy = f"it is above init_r, {self.init_r}", "Ranks only fall. Give a larger init_r."
            raise LuthierError("recipe-conflict", problem, where="AdaLora.target_r", found=self.target_r, remedy=remedy)
