"""Quantized models: a base model in its quantizer's form, and the files of one whose quantized layers were trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError
from luthier.model.foreign import explain_reading
from luthier.model.weights.loaded_weights import check_finite
from luthier.plugins.contracts.protocols import Quantizer
from luthier.plugins.contracts.values import Context, Progress
from luthier.randomness import keep_randomness, seed_all

APPLYING: Final = -2  # replaces the step number in the random key, so that no step draws the same numbers
QUANTIZED: Final = "quantized"  # the name in an artifact's note for a folder written by `Quantizer.save`


def apply_quantizer(quantizer: Quantizer, model: Any, context: Context, progress: Progress | None = None) -> Any:
    """Return the model in its quantizer's form, told how many steps are done; None: none yet.

    What the quantizer draws follows from the run's seed, in every world alike.
    """
    with keep_randomness():
        seed_all(context.seed, APPLYING)
        model = quantizer.apply(model, context)
    quantizer.progressed(progress or Progress(step=0, total_steps=context.total_steps, epoch=0.0))
    return model


def write_trained(model: Any, folder: Path, quantizer: Quantizer) -> None:
    """Write a model whose quantized layers were trained: its config, and what its quantizer makes of the rest."""
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    quantizer.save(model, folder)


def read_quantized(quantizer: Quantizer, folder: Path, model: Any) -> Any:
    """Return a model of empty quantized layers once its quantizer has read their files; what is broken is said."""
    with explain_reading(folder, "artifact-not-found"):
        model = quantizer.load(folder, model)
    check_finite(model, str(folder))
    return model


def find_trained(name: str) -> Path | None:
    """Return the folder of a model whose quantized layers were trained, where a base model's name is one."""
    folder = Path(os.path.expanduser(name))
    return folder if _note(folder).get("artifact") == QUANTIZED else None


def check_quantizer(name: str, quantizer: Mapping[str, Any]) -> None:
    """Raise `recipe-conflict` where a base model was trained in the form of another quantizer than the recipe's."""
    folder = find_trained(name)
    trained_in = {} if folder is None else _note(folder)["quantizer"]
    if trained_in and trained_in != quantizer:
        differing = _differing(trained_in, quantizer)
        problem = f"{name} was trained in the form of quantizer {_shorten(trained_in, differing)}"
        remedy = "Use the same one, or begin from a model with plain weights, such as a merged one."
        raise LuthierError("recipe-conflict", problem, where="quantizer", found=_shorten(quantizer, differing),
                           remedy=remedy)  # fmt: skip


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of the options in which two quantizers of the same name differ; none of different ones."""
    if one.get("name") != other.get("name"):
        return []
    return [option for option in {**one, **other} if one.get(option) != other.get(option)]


def _shorten(quantizer: Mapping[str, Any], options: list[str]) -> str:
    """Return a quantizer as a recipe has it, with some of its options."""
    named = ", ".join(f"{option}: {quantizer.get(option)}" for option in ("name", *options))
    return f"{{{named}}}" if options else str(quantizer.get("name"))


def _note(folder: Path) -> dict[str, Any]:
    """Return what stands beside an artifact; nothing where there is none."""
    from luthier.recipe.artifact_note import NOTE

    try:
        note = json.loads((folder / NOTE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
