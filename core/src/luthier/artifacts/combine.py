"""Combining: several low-rank adapters of one base become one adapter, whose files every LoRA reader reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import attrs
import torch

from luthier.artifacts.factor_arithmetic import DRAWN, PRUNED, Blend, Method, Pair, combine_pairs
from luthier.artifacts.folders import check_replaceable, same_base, write_artifact
from luthier.artifacts.low_rank_files import LowRankFolder, read_low_rank, unit_scales, write_low_rank
from luthier.artifacts.note import derive_note
from luthier.errors import LuthierError, suggest_nearest
from luthier.logs import get_logger
from luthier.model.load import tokenizer_at
from luthier.plugins.registry import installed_plugins
from luthier.step.opened import names_everything, open_adapter

log = get_logger()
CHOSEN: Final = ("preset", "rank_energy", "rank_budget", "rank_gradient")  # options that would choose other ranks


@attrs.frozen(kw_only=True)
class Combination:
    """The requested combination. None means equal weights, and no pruning or seed, which only some methods have."""

    method: str = "linear"
    weights: tuple[float, ...] | None = None
    density: float | None = None
    seed: int | None = None


def combine_folders(folders: Sequence[Path], asked: Combination, folder: Path) -> Path:
    """Write the combination of the adapters to `folder`. If a note names their base, open it again as a check.

    Whatever the settings decide is refused before a tensor is read. Raises `artifact-mismatch` if adapters have
    different layers, shapes or bases, or contain a tensor that the arithmetic does not use.
    """
    recipe = _recipe(asked, len(folders))
    check_replaceable(folder)
    adapters = [read_low_rank(path) for path in folders]
    _check_alike(adapters, recipe.method)
    generator = torch.Generator().manual_seed(asked.seed or 0)
    factors = {
        layer: combine_pairs([adapter.pairs[layer] for adapter in adapters], recipe, generator)
        for layer in adapters[0].pairs
    }
    changes, first = unit_scales(factors), adapters[0]
    note = _note(changes, adapters, recipe)

    def write(aside: Path) -> None:
        write_low_rank(aside, factors, {**first.config, **changes, "init_lora_weights": True, "lora_dropout": 0.0})
        if (first.path / "tokenizer_config.json").is_file():
            tokenizer_at(str(first.path)).save_pretrained(aside)
        if note is not None and names_everything(note):
            open_adapter(aside, note, torch.device("cpu"))

    made = write_artifact(folder, write, note)
    log.info("combined", folder=str(made), method=recipe.method, weights=_weights(recipe), layers=len(factors))
    return made


def _recipe(asked: Combination, count: int) -> Blend:
    methods = get_args(Method)
    if asked.method not in methods:
        raise _refused("unknown method", "method", asked.method, suggest_nearest(asked.method, methods))
    if count < 2:
        raise _refused("one adapter cannot be combined alone", "paths", count, "Give two or more.")
    if asked.weights is not None and len(asked.weights) != count:
        raise _refused("there must be one weight for each adapter", "weights", asked.weights, f"Give {count}.")
    if not all(map(math.isfinite, asked.weights or ())):
        raise _refused("a weight is not a finite number", "weights", asked.weights, "Give numbers.")
    if asked.weights is not None and asked.method == "slao":
        raise _refused("slao takes the adapters in their order, without weights", "weights", asked.weights, "")
    pruned = asked.method in PRUNED
    if pruned != (asked.density is not None):
        remedy = f"Only {', '.join(PRUNED)} take a density, and each needs one, such as 0.5."
        problem = f"{asked.method} {'keeps a share of the numbers, which is not given' if pruned else 'prunes nothing'}"
        raise _refused(problem, "density", asked.density, remedy)
    if asked.density is not None and not 0 < asked.density <= 1:
        raise _refused("outside its bounds", "density", asked.density, "Give a number above 0, and at most 1.")
    if asked.seed is not None and asked.method not in DRAWN:
        raise _refused("nothing is drawn at random", "seed", asked.seed, f"Only {' and '.join(DRAWN)} draw.")
    method: Any = asked.method
    return Blend(method=method, weights=asked.weights or (1 / count,) * count, density=asked.density or 1.0)


def _refused(problem: str, where: str, value: object, remedy: str) -> LuthierError:
    return LuthierError("recipe-out-of-range", problem, where=where, found=value, remedy=remedy)


def _check_alike(adapters: Sequence[LowRankFolder], method: str) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        noted = bool(first.note and other.note)
        same = same_base(first.note, other.note) if noted else _same_name(first.config, other.config)
        if not same:
            base = other.note["model"]["name_or_path"] if noted else other.config["base_model_name_or_path"]
            raise _unlike(other, f"it was trained on another base than {first.path}", base)
        missing = sorted(first.pairs.keys() ^ other.pairs.keys())
        if missing:
            raise _unlike(other, f"its layers are not those of {first.path}", missing[0])
        for layer, pair in first.pairs.items():
            if _shape(pair, method) != _shape(other.pairs[layer], method):
                ranks = f"{other.pairs[layer].a.shape[0]} beside {pair.a.shape[0]}"
                raise _unlike(other, "a layer has another shape or rank (only cat takes several ranks)",
                              f"{layer}: {ranks}")  # fmt: skip


def _same_name(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True unless two of PEFT's configurations name different bases."""
    names = [each.get("base_model_name_or_path") for each in (config, other)]
    own, theirs = (Path(name).resolve() if name and Path(name).is_dir() else name for name in names)
    return not own or not theirs or own == theirs


def _shape(pair: Pair, method: str) -> tuple[int, ...]:
    rank = 0 if method == "cat" else pair.a.shape[0]
    return (rank, pair.a.shape[1], pair.b.shape[0])


def _unlike(adapter: LowRankFolder, problem: str, value: object) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(adapter.path), found=value,
                        remedy="Combine adapters of one base, with the same targets.")  # fmt: skip


def _note(changes: dict[str, Any], adapters: Sequence[LowRankFolder], recipe: Blend) -> dict[str, Any] | None:
    """Return what stays true of the first adapter's note, with the combined options; None without a note."""
    note = adapters[0].note
    if not note:
        return None
    own, plugins = note["adapter"], installed_plugins()
    if "name" in own:
        known = {field.name for field in attrs.fields(plugins.options(plugins.get("adapter", own["name"])))}
        unchanged = {name: value for name, value in own.items() if name not in CHOSEN}
        own = {**unchanged, **{name: value for name, value in changes.items() if name in known}}
    made = {"method": recipe.method, "weights": _weights(recipe), "density": recipe.density,
            "of": [str(adapter.path) for adapter in adapters],
            "runs": [adapter.note.get("run_id") for adapter in adapters]}  # fmt: skip
    return {**derive_note(note), "adapter": own, "decisions": {}, "artifact": "adapter", "combined": made}


def _weights(recipe: Blend) -> list[float] | None:
    """Return the weights that counted; None for SLAO, which has none."""
    return None if recipe.method == "slao" else list(recipe.weights)
