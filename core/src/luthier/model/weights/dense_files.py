"""Weights: a dense model in transformers' own layout, in shards of a size and a dtype that its config agrees with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from torch import Tensor

from luthier.errors import LuthierError, suggest_nearest
from luthier.logs import get_logger
from luthier.model.load import quiet
from luthier.model.model_config import config_of
from luthier.model.weights.sampled.sampled_state import sample_state
from luthier.recipe.checks.saving_checks import shard_bytes

if TYPE_CHECKING:
    from luthier.recipe import Recipe
    from luthier.recipe.schema import Model

log = get_logger()
CONFIG: Final = "config.json"
DTYPES: Final = ("float32", "bfloat16", "float16")


@attrs.frozen(kw_only=True)
class Files:
    """How a dense model is written. `dtype` None: as the weights are. `asked`: the recipe names the dtype itself."""

    dtype: torch.dtype | None = None
    max_shard_size: str = "5GB"
    asked: bool = False

    @classmethod
    def of_recipe(cls, recipe: Recipe, came: torch.dtype, wish: str | None = None) -> Files:
        """Return a recipe's settings for files; `auto` is the dtype of the base checkpoint. `came` is that of the
        loaded

        `wish` is the dtype that the adapter's record names, which counts where the recipe says `auto`.
        """
        asked = recipe.save_dtype != "auto"
        named = recipe.save_dtype if asked else wish
        dtype = base_dtype(recipe.model, came) if named is None else getattr(torch, named)
        return cls(dtype=dtype, max_shard_size=recipe.max_shard_size, asked=asked)

    @classmethod
    def of_note(cls, note: Mapping[str, Any]) -> Files:
        """Return what the note beside an artifact says of them."""
        known = dict(note.get("files", {}))
        if known.get("dtype"):
            known["dtype"] = getattr(torch, known["dtype"])
        return cls(**known)

    def plain(self) -> dict[str, Any]:
        """For the note: plain data."""
        return {**attrs.asdict(self), "dtype": None if self.dtype is None else _name(self.dtype)}


def file_options(save_dtype: str | None, max_shard_size: str | None) -> dict[str, Any]:
    """Return the substitute for a note's `files`. Raises `recipe-out-of-range` for what is no dtype or size."""
    changes: dict[str, Any] = {}
    if save_dtype is not None:
        if save_dtype not in DTYPES:
            raise LuthierError("recipe-out-of-range", "no dtype of files", where="save_dtype", found=save_dtype,
                               remedy=suggest_nearest(save_dtype, DTYPES))  # fmt: skip
        changes |= {"dtype": save_dtype, "asked": True}
    if max_shard_size is not None:
        shard_bytes(max_shard_size)
        changes |= {"max_shard_size": max_shard_size}
    return changes


def base_dtype(spec: Model, came: torch.dtype) -> torch.dtype:
    """Return the dtype of the base checkpoint's files; a model that was an object in Python has its own."""
    if spec.name_or_path.startswith("python:"):
        return came
    dtype = config_of(spec).dtype
    return dtype if isinstance(dtype, torch.dtype) else came


def save_model(model: Any, folder: Path, files: Files) -> None:
    """Config and safetensors, an index where there are several. Weights that change by it are told of aloud.

    Raises `artifact-dtype` where a weight is too large for the dtype.
    """
    dtype = files.dtype or model.dtype
    state = _cast(model, dtype, sample_state(model.state_dict()), asked=files.asked)
    with quiet():
        model.save_pretrained(folder, state_dict=state, max_shard_size=files.max_shard_size)
    path = folder / CONFIG  # the config file describes the model in memory
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(_retyped(config, _name(dtype)), indent=2, sort_keys=True) + "\n", "utf-8")


def _cast(model: Any, dtype: torch.dtype, state: dict[str, Tensor], *, asked: bool) -> dict[str, Tensor]:
    """Return the model's state in `dtype`, shared tensors shared, what the architecture keeps in float32 in that."""
    precise = _kept_precise(model, dtype)
    done: dict[tuple[int, torch.dtype], Tensor] = {}
    rounded: set[str] = set()
    for name, tensor in state.items():
        wanted = torch.float32 if precise is not None and precise.search(name) else dtype
        if not tensor.is_floating_point() or tensor.dtype == wanted:
            continue
        key = (tensor.data_ptr(), wanted)
        if key not in done:
            done[key] = _converted(tensor, wanted, name)
            rounded |= {_name(tensor.dtype)} if _differs(tensor, done[key]) else set()
        state[name] = done[key]
    if rounded:
        tell = log.info if asked else log.warning
        tell("weights are rounded in the files", to=_name(dtype), of=sorted(rounded), remedy="save_dtype: float32")
    return state


def _converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    made = tensor.to(dtype)
    if torch.isfinite(tensor).all() and not torch.isfinite(made).all():
        problem = f"{name} holds {float(tensor.abs().max()):.3g}, which {_name(dtype)} cannot"
        raise LuthierError("artifact-dtype", problem, where="save_dtype")
    return made


def _differs(before: Tensor, after: Tensor) -> bool:
    return torch.finfo(after.dtype).bits < torch.finfo(before.dtype).bits and not torch.equal(
        after.to(before.dtype), before
    )


def _kept_precise(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return the modules that transformers loads in float32 whatever it is asked for."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in sorted(names))) if names else None


def _retyped(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the config with `dtype` wherever it says one, those of its towers included."""
    nested = {key: _retyped(value, name) if isinstance(value, dict) else value for key, value in config.items()}
    return {**nested, "dtype": name} if "dtype" in config else nested


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
