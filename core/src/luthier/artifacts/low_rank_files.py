"""Low-rank files: an adapter's folder in PEFT's LoRA layout, read so that every tensor is accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from luthier.artifacts.factor_arithmetic import Pair
from luthier.errors import LuthierError
from luthier.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, read_peft_object, read_peft_tensors, write_peft_files
from luthier.recipe.artifact_note import MOVED, keeps_base, read_note

NAME: Final = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


@attrs.frozen(kw_only=True, eq=False)
class LowRankFolder:
    """An adapter as its files describe it: the pair of factors of each layer, PEFT's configuration, and the note beside
    it.
    """

    path: Path
    pairs: dict[str, Pair]
    config: dict[str, Any]
    note: dict[str, Any]


def read_low_rank(folder: Path) -> LowRankFolder:
    """Return the adapter in a folder.

    Raises `artifact-not-found` if there is none, and `artifact-mismatch` for another method's adapter, a tensor that is
    no factor, a factor without its partner, or NaN.
    """
    config, tensors = read_peft_object(folder), read_peft_tensors(folder)
    _check_config(config, folder)
    sides = _sides(tensors, folder)
    pairs = {
        layer: Pair(a=factors["A"].float(), b=factors["B"].float(), scale=_scale(config, layer, factors["A"].shape[0]))
        for layer, factors in sides.items()
    }
    return LowRankFolder(path=folder, pairs=pairs, config=config, note=read_note(folder))


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA" or config.get("use_dora"):
        method = "DoRA" if kind == "LORA" else kind
        raise _misfit(folder / PEFT_CONFIG, "only the factors of LoRA can be combined", method)
    if not keeps_base(config):
        problem = f"{MOVED}, which is not in its files"
        raise _misfit(folder / PEFT_CONFIG, problem, f"init_lora_weights: {config['init_lora_weights']}")
    if config.get("target_parameters"):  # factors of experts hold many ranks each, which this module cannot read
        targets = f"target_parameters: {config['target_parameters']}"
        raise _misfit(
            folder / PEFT_CONFIG, "the factors of parameters, such as experts, are not those of layers", targets
        )


def _sides(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the factors A and B of each layer, by its name.

    Raises unless every tensor is a factor and none is missing.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        parts = NAME.fullmatch(name)
        if parts is None:
            raise _misfit(folder / PEFT_WEIGHTS, "this tensor is no factor of a layer", name)
        if not tensors[name].isfinite().all():
            raise _misfit(folder / PEFT_WEIGHTS, "it holds NaN or infinity", name)
        sides.setdefault(parts["layer"], {})[parts["side"]] = tensors[name]
    for layer, factors in sides.items():
        if len(factors) == 1:
            raise _misfit(folder / PEFT_WEIGHTS, "the other factor of this layer is missing", layer)
        if factors["A"].shape[0] != factors["B"].shape[1]:
            raise _misfit(folder / PEFT_WEIGHTS, "the factors of this layer differ in rank", layer)
    return sides


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    name = layer.removeprefix("base_model.model.")
    patterns = (config.get("alpha_pattern") or {}).items()
    alphas = [alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", name)]
    alpha = float([*alphas, config.get("lora_alpha", 8)][0])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def write_low_rank(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], config: Mapping[str, Any]) -> None:
    """Write both files. `factors` maps each layer to its A and B, whose scale is 1."""
    tensors = {f"{layer}.lora_{side}.weight": tensor.to(torch.float32).contiguous()
               for layer, pair in factors.items() for side, tensor in zip("AB", pair, strict=True)}  # fmt: skip
    write_peft_files(folder, config, tensors)


def unit_scales(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return the options of PEFT's configuration that give each layer the rank of its factors, and the scale 1."""
    ranks = {layer.removeprefix("base_model.model."): int(a.shape[0]) for layer, (a, _) in factors.items()}
    common = max(ranks.values())
    own = {re.escape(layer): rank for layer, rank in ranks.items() if rank != common}
    return {"r": common, "lora_alpha": common, "rank_pattern": own, "alpha_pattern": dict(own), "use_rslora": False}


def _misfit(path: Path, problem: str, value: object) -> LuthierError:
    remedy = "Combine LoRA adapters that train nothing but their factors."
    return LuthierError("artifact-mismatch", problem, where=str(path), found=value, remedy=remedy)
