"""The place of a run: the folder that it trains in, and whether it goes on with what lies there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from luthier.errors import LuthierError
from luthier.recipe import recipe_hash
from luthier.recipe.writing import determining_settings
from luthier.runs.run_folder import CHECKPOINTS, free_folder, read_folder
from luthier.runs.writing import differences as changes
from luthier.runs.writing.record import RECIPE, RECORD, read_record, require_entries
from luthier.runs.writing.save_requests import ASKED

if TYPE_CHECKING:
    from luthier.recipe import Recipe
    from luthier.recipe.objects import Objects

OURS = {"lock", "log.jsonl", RECIPE, "metrics.jsonl", ASKED}  # files that may exist before run.json does
KEPT = {CHECKPOINTS, "constants", "set-aside"}  # folders from which a run can go on without its run.json


@attrs.frozen(kw_only=True)
class Place:
    """The folder of a run. `done`: its run is complete; `changed`: it goes on with another recipe, as allowed."""

    folder: Path
    record: dict[str, Any] | None = None
    done: bool = False
    changed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**attrs.asdict(self, recurse=False), "folder": str(self.folder)}

    @classmethod
    def of(cls, message: dict[str, Any]) -> Place:
        return cls(
            folder=Path(message["folder"]), record=message["record"], done=message["done"], changed=message["changed"]
        )


def find_place(recipe: Recipe, objects: Objects, *, fresh: bool, allowed: frozenset[str] = frozenset()) -> Place:
    """Return the run's folder. Raises `run-folder-other` for another run's, unless what differs is allowed.

    With `fresh`, and if objects were passed in Python, a new folder beside it is taken.
    """
    given = any(v is not None for v in attrs.astuple(objects, recurse=False))
    folder = Path(recipe.output_dir) if recipe.output_dir else default_folder(recipe)
    again = begun(folder)
    record = read_record(again or folder)
    if again is None and (fresh or (given and record is not None and recipe.output_dir is None)):
        return Place(folder=free_folder(folder))
    folder = again or folder
    if record is None:
        _refuse_strangers(folder)
        return Place(folder=folder)
    require_entries(folder, record, ("recipe_hash", "run_id", "state"))
    changed = record["recipe_hash"] != recipe_hash(recipe) and _differs(recipe, folder, record, allowed)
    return Place(folder=folder, record=record, done=record["state"] == "completed" and not changed, changed=changed)


def begun(folder: Path, inside: str = "") -> Path | None:
    """Return the folder, or one beside it, that an earlier start of the same torchrun launch has begun; else None.

    `inside` is the place of the first run in a folder of several.
    """
    launch, number, candidate = os.environ.get("TORCHELASTIC_RUN_ID"), 2, folder
    if launch is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    while candidate.exists():
        if (read_record(candidate / inside) or {}).get("launch") == launch:
            return candidate
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return None


def check_unchanged(place: Place) -> None:
    """Raise `run-folder-locked` if another process has begun or ended a run there meanwhile. Called under the lock."""
    now_there, known = read_record(place.folder) or {}, place.record or {}
    if now_there.get("run_id") != known.get("run_id") or (now_there.get("state") == "completed" and not place.changed):
        problem = "another process trained here in the meantime"
        raise LuthierError("run-folder-locked", problem, where=str(place.folder), remedy="Run the same command again.")


def _differs(recipe: Recipe, folder: Path, record: dict[str, Any], allowed: frozenset[str]) -> bool:
    """Return True if the recipe differs from the folder's in an allowed way. Raises `run-folder-other` if it may not.

    A run of an earlier luthier may look different only because options were added since.
    """
    was, settings = {"recipe": record["recipe_hash"]}, read_folder(folder).settings()
    if settings is not None:
        was["settings"] = settings
    differences = changes.find_changes(was, {"recipe": recipe_hash(recipe), "settings": determining_settings(recipe)})
    where = f"{folder}: run {record['run_id']} of another recipe"
    changes.refuse_changes(differences, allowed, where, code="run-folder-other")
    return bool(differences)


def default_folder(recipe: Recipe) -> Path:
    """Return runs/<model>-<adapter>-<hash>, so that the same recipe finds its own folder again."""
    from luthier.plugins.registry import installed_plugins
    from luthier.recipe.parts import find_part

    model = Path(recipe.model.name_or_path).name or "model"
    adapter = find_part(recipe.adapter, "adapter", "adapter", installed_plugins()).name.rpartition(".")[2]
    # a run's name may have characters that file names must not have
    named = re.sub(r"[^\w.-]+", "-", recipe.run_name or "").strip("-.")
    return Path("runs") / (named or f"{model}-{adapter}-{recipe_hash(recipe)[:8]}")


def _refuse_strangers(folder: Path) -> None:
    """Raise `run-folder-other` if the folder holds files of no run, which luthier must not mix with its own."""
    if folder.exists() and not folder.is_dir():
        raise LuthierError("run-folder-other", "a file has this name", where=str(folder))
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    whole = any((folder / CHECKPOINTS).glob("step-*/manifest.json"))  # checkpoints of a run that has lost its run.json
    ours = OURS | (KEPT if whole else set())
    strangers = [name for name in names if name not in ours and not name.startswith(f".{RECORD}.")]
    if strangers:
        problem = f"the folder holds other files: {', '.join(sorted(strangers)[:3])}"
        raise LuthierError("run-folder-other", problem, where=str(folder))
