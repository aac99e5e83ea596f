"""Other models of a recipe: a run used as the model, and what reference and teacher require of other settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.errors import LuthierError
from luthier.plugins.structure import bare_value
from luthier.recipe.artifact_note import RECORD, _artifact_of, read_note

if TYPE_CHECKING:
    from luthier.plugins.compatibility import Chosen
    from luthier.recipe.reading.draft import Draft
    from luthier.recipe.schema import OtherModel, Settings


def open_run_model(draft: Draft) -> None:
    """Replace a model that is a run's folder, or its adapter's, by the run's base model and `adapter_from`.

    The adapter and the quantizer are then the run's, unless the recipe names others.
    """
    model = draft.tree.get("model")
    if not isinstance(model, dict):
        return
    name = bare_value(model.get("name_or_path"))
    if not isinstance(name, str) or name == "demo":
        return
    folder = (draft.base(("model", "name_or_path")) or Path()) / Path(os.path.expanduser(name))
    if (folder / RECORD).is_file():
        folder = _artifact_of(folder)
        model["name_or_path"] = str(folder)
    note = read_note(folder)
    if note.get("artifact") != "adapter":
        return
    base = {k: v for k, v in note["model"].items() if k != "dropout"}  # that was for the run's own steps
    draft.tree["model"] = {**base, **{k: v for k, v in model.items() if k != "name_or_path"}}
    taken = {kind: note[kind] for kind in ("adapter", "quantizer") if kind not in draft.tree and "name" in note[kind]}
    draft.tree.update(taken)
    draft.tree.setdefault("adapter_from", str(folder))
    label = draft.label(("model",))
    note_text = f"the model {name} is a run's adapter: {' and '.join(['its base', *taken])} are taken from it"
    draft.notes.append(f"{label}: {note_text}" if label else note_text)


def check_other_models(recipe: Settings) -> None:
    """Raise for a model without a name, and for a cache of log-probabilities of rows not known in advance."""
    for field in ("reference", "teacher"):
        other = getattr(recipe, field)
        if not (other is None or isinstance(other, str) or other.model.name_or_path):
            raise LuthierError("recipe-missing", "is empty", where=f"{field}.model.name_or_path")
        _check_still(other, field)
    for field in ("reference_cache", "teacher_cache"):
        if getattr(recipe, field) and recipe.data.streaming:
            problem, remedy = "a stream's rows are not known before the first step", "Leave one of the two out."
            raise LuthierError("recipe-conflict", problem, where=field, found=True, remedy=remedy)


def _check_still(other: OtherModel | str | None, field: str) -> None:
    """Raise `recipe-conflict` for dropout in a model that does not train."""
    if not (other is None or isinstance(other, str) or other.model.dropout is None):
        problem, where = "nothing reads it: this model computes without dropout", f"{field}.model.dropout"
        raise LuthierError("recipe-conflict", problem, where=where, found=other.model.dropout, remedy="Leave it out.")


def _adapter_name(chosen: list[Chosen]) -> str:
    return next((repr(part.name) for part in chosen if part.kind == "adapter"), "none")


def other_model_tags(recipe: Settings, chosen: list[Chosen]) -> dict[str, str]:
    """Return the tags that the recipe's reference and teacher provide, and how the recipe calls them.

    The run itself keeps what a reference needs; only `base` depends on the adapter. Raises `recipe-conflict` for a
    reference or teacher that no part needs.
    """
    needed = {tag for part in chosen for tag in part.needs}
    given: dict[str, str] = {}
    has_base = any("reference" in part.provides for part in chosen)
    if "reference" in needed and recipe.reference == "base" and not has_base:
        problem = f"adapter {_adapter_name(chosen)} changes the base model itself, so no base is left to compare with"
        remedy = "Choose reference: initial, the policy before the first step, or {model: ...}."
        raise LuthierError("recipe-conflict", problem, where="reference", found="base", remedy=remedy)
    if "reference" in needed and recipe.reference != "base":
        word = recipe.reference if isinstance(recipe.reference, str) else "{model: ...}"
        given["reference"] = f"the run (reference: {word})"
    if recipe.teacher is not None:
        given["teacher"] = "the recipe (teacher)"
    asked: Mapping[str, tuple[bool, str]] = {
        "reference": (recipe.reference != "auto", "reference"),
        "reference_cache": (recipe.reference_cache, "reference"),
        "teacher": (recipe.teacher is not None, "teacher"),
        "teacher_cache": (recipe.teacher_cache, "teacher"),
    }
    for field, (is_given, tag) in asked.items():
        if is_given and tag not in needed:
            remedy = f"Leave it out, or choose a loss that needs {tag}."
            raise LuthierError("recipe-conflict", f"no part needs a {tag}", where=field, remedy=remedy)
    return given
