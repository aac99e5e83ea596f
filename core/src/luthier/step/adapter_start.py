"""The start from a trained adapter: `adapter_from`, held against the base model before any weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.foreign import explain_reading
from luthier.model.weights import fingerprint
from luthier.model.weights.loaded_weights import check_tensors
from luthier.recipe.artifact_note import find_artifact, read_note

if TYPE_CHECKING:
    from luthier.plugins.contracts.protocols import Adapter
    from luthier.recipe import Recipe
    from luthier.recipe.schema import Model

log = get_logger()
OPTION = "adapter_from"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT = "adapter_config.json"  # a folder with this file has PEFT's layout, perhaps without a note


def find_start(recipe: Recipe) -> Path | None:
    """Return the folder of the adapter that a run begins from; None where it begins from none.

    Raises `artifact-not-found` where there is no adapter, and `artifact-mismatch` for one of another base model.
    """
    if recipe.adapter_from is None:
        return None
    folder = find_artifact(recipe.adapter_from) or Path(os.path.expanduser(recipe.adapter_from))
    if not folder.is_dir():
        raise LuthierError("artifact-not-found", "there is no such folder", where=OPTION, found=recipe.adapter_from)
    note = read_note(folder)
    if note.get("artifact", "adapter") != "adapter":
        problem = "the folder holds a whole model, not an adapter"
        remedy = f"Set model: {folder}, and leave {OPTION} out."
        raise LuthierError("artifact-mismatch", problem, where=OPTION, found=str(folder), remedy=remedy)
    _check_base(folder, note, recipe.model)
    return folder


def read_adapter(adapter: Adapter, folder: Path) -> None:
    """Let an attached adapter read its files; whatever is wrong with them is said with their place."""
    with explain_reading(folder, "artifact-not-found"):
        adapter.load(folder)
    named = (pair for group in adapter.groups() for pair in zip(group.names, group.parameters, strict=False))
    check_tensors(named, str(folder))


def load_start(adapter: Adapter, folder: Path) -> None:
    """Read the adapter's weights into the attached one; what does not fit is said with the option's name.

    The files' own numbers are looked at, because the attached adapter of a plan has none.
    """
    try:
        with explain_reading(folder, "artifact-not-found"):
            _check_numbers(folder)
        read_adapter(adapter, folder)
    except LuthierError as error:
        raise error.at(OPTION) from error
    log.info("adapter begins from", folder=str(folder))


def _check_numbers(folder: Path) -> None:
    """Raise `model-weights` where a tensor in the folder's files holds NaN or infinity."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            check_tensors(((name, file.get_tensor(name)) for name in names), str(path))


def _check_base(folder: Path, note: dict[str, Any], model: Model) -> None:
    """Raise `artifact-mismatch` where an adapter says that it was trained on another base model."""
    was = note["model"]["name_or_path"] if note else _peft_base(folder)
    now = model.name_or_path
    if was is None or was.startswith("python:") or now.startswith("python:"):
        return
    then, today = note.get("base") or _print_of(was), _print_of(now)
    known = None not in (then, today)  # otherwise one model's files are elsewhere, and only the names can be compared
    same = then == today if known else was == now
    if known and not same and not note and _was_resized(folder, was, now):
        log.info("the base of the adapter was resized", folder=str(folder), base=was, model=now)
        return
    if not same and (known or not (_local(was) or _local(now))):
        remedy = f"Set model: {was}, or begin from an adapter of {now}."
        problem = f"the adapter was trained on another base model, {was}{_differences(was, now, then, today)}"
        raise LuthierError("artifact-mismatch", problem, where=f"{OPTION}: {folder}", found=now, remedy=remedy)


def _was_resized(folder: Path, was: str, now: str) -> bool:
    """Return True if a model differs from PEFT's base in the vocabulary alone, and the file has all of its rows."""
    from safetensors import safe_open

    old, new = fingerprint.sizes_of(was), fingerprint.sizes_of(now)
    others = {key for key in old if new.get(key) != old[key]} != {"vocab_size"}
    if others or not (folder / PEFT_WEIGHTS).is_file():
        return False
    with explain_reading(folder, "artifact-not-found"), safe_open(folder / PEFT_WEIGHTS, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - it is no mapping
    return any(len(shape) == 2 and shape[0] == new["vocab_size"] for shape in shapes)


def check_opened_base(folder: Path, note: Mapping[str, Any], now: str, *, named: bool) -> None:
    """Raise `artifact-mismatch` where an adapter's folder would be opened on weights other than those of its note.

    It is raised too where the adapter would be opened on the model that it was merged into.

    A base that the user has `named` in the place of the note's is taken, with a warning.
    """
    was, then, today = note["model"]["name_or_path"], note.get("base"), _print_of(now)
    merged = read_note(Path(os.path.expanduser(now)))
    if merged.get("merge") is not None and note.get("run_id") is not None and merged["run_id"] == note["run_id"]:
        problem, remedy = "the adapter is merged into this model already", f"Use the model alone, or {was} as base."
        raise LuthierError("artifact-mismatch", problem, where=str(folder), found=now, remedy=remedy)
    if None in (then, today) or then == today:
        return
    problem = f"the adapter was trained on another base model, {was}{_differences(was, now, then, today)}"
    if named:
        log.warning(problem, folder=str(folder), base=now)
        return
    remedy = "Name the base that it was trained on with base, or put its files back."
    raise LuthierError("artifact-mismatch", problem, where=str(folder), found=now, remedy=remedy)


def _differences(was: str, now: str, then: str | None, today: str | None) -> str:
    """Return in what two bases differ, as far as it is known: their hashes, and the sizes in their configs."""
    facts = {"hash": (then, today)} if None not in (then, today) else {}
    old, new = (fingerprint.sizes_of(name) if _local(name) else {} for name in (was, now))
    facts |= {key: (str(old[key]), str(new[key])) for key in old if key in new and old[key] != new[key]}
    return "".join(f"; its {key} is {one}, here {other}" for key, (one, other) in facts.items())


def _print_of(name: str) -> str | None:
    """Return the fingerprint of a model that lies in a folder here; None for any other."""
    return fingerprint.of_model(name) if _local(name) else None


def _local(name: str) -> str | None:
    return name if name == "demo" or Path(os.path.expanduser(name)).is_dir() else None


def _peft_base(folder: Path) -> str | None:
    try:
        name = json.loads((folder / PEFT).read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None
