"""What can be refused before torch is imported: missing files, unwritable folders, misspelt names of runs."""

from __future__ import annotations

import contextlib
import difflib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from luthier.errors import LuthierError, unwritable_path

if TYPE_CHECKING:
    from luthier.recipe import Recipe

RUNS: Final = Path("runs")  # where runs go that name no output_dir
NEAR: Final = 0.75  # the share of letters in common from which another run is proposed for a name with one slash


def check_places(recipe: Recipe) -> None:
    """Refuse a source that is no file here, or an output folder that cannot be written, without heavy imports.

    Names that can only be a hub's, and addresses, are left to those who open them. Raises `data-not-found` and
    `path-unwritable`.
    """
    from luthier.data.read.sources import find_files

    validation = recipe.data.validation
    for source in (*recipe.data.train, *(validation if isinstance(validation, list) else ())):
        if ":" not in source.path.split("/")[0]:  # s3://..., python:rows
            find_files(source.path)
    if recipe.output_dir is not None:
        check_writable(Path(recipe.output_dir))


def check_writable(folder: Path) -> None:
    """Raise `path-unwritable` where a folder neither is writable nor could be made; what is tried is taken back."""
    try:
        missing = [path for path in (folder.absolute(), *folder.absolute().parents) if not os.path.lexists(path)]
        if missing:
            with contextlib.suppress(FileExistsError):  # another process has just made it
                missing[-1].mkdir()
                with contextlib.suppress(OSError):  # another process has begun to use it
                    missing[-1].rmdir()
        else:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise unwritable_path(folder, error) from None
    except ValueError as error:  # a character that no path can hold
        raise LuthierError("path-unwritable", str(error), where=str(folder)) from None


def check_model_name(name: str) -> None:
    """Refuse a path to nothing, with the runs whose names are like it; names of a hub pass.

    Raises `model-not-found`.
    """
    path = Path(os.path.expanduser(name))
    if name == "demo" or path.exists():
        return
    is_path = path.is_absolute() or name.startswith((".", "~", f"{RUNS}{os.sep}")) or len(path.parts) > 2
    names = _run_names(path)
    near = [names[found] for found in difflib.get_close_matches(path.name, names, n=2, cutoff=0.6 if is_path else NEAR)]
    if not is_path and not near:
        return
    remedy = f"Did you mean {' or '.join(near)}?" if near else "Check the path; `luthier runs` lists the runs."
    raise LuthierError("model-not-found", "there is no such folder", where=name, remedy=remedy)


def _run_names(path: Path) -> dict[str, str]:
    """The path of every run beside the one that is meant, and in `runs`, by its folder's name."""
    from luthier.runs.find import is_run

    places = [path.parent, RUNS] if len(path.parts) > 1 else [RUNS, Path()]
    found = [run for place in places if place.is_dir() for run in place.iterdir() if run.is_dir() and is_run(run)]
    return {run.name: str(run) for run in reversed(found)}
