"""Checks before torch is imported: missing files, unwritable folders, misspelt names of runs."""

from __future__ import annotations

import contextlib
import difflib
import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luthier.errors import LuthierError, unwritable_path

if TYPE_CHECKING:
    from luthier.recipe import Recipe

RUNS: Final = Path("runs")  # the folder of runs without output_dir
NEAR: Final = 0.75  # similarity at which a run is suggested for a name with one slash, which may be a hub name


def check_places(recipe: Recipe) -> None:
    """Refuse a source that is a missing file, or an output folder that cannot be written, without heavy imports.

    Names that can only be a hub's, and addresses, are checked by those who open them. Raises `data-not-found` and
    `path-unwritable`.
    """
    from luthier.data.read.sources import local_sources

    local_sources(recipe.data)
    if recipe.output_dir is not None:
        check_writable(Path(recipe.output_dir))


def check_chosen_parts(recipe: Recipe) -> None:
    """Raise what a run would raise for parts that do not go together, whatever its device is."""
    from luthier.recipe import resolve_parts
    from luthier.recipe.checks.soundness import check_parts

    if recipe.trainer is None:  # another trainer has its own checks
        check_parts(recipe, resolve_parts(recipe), recipe.device.partition(":")[0])


def check_exporter(chosen: Mapping[str, Any]) -> None:
    """Raise for an exporter `{name: ..., options}` that is not installed, or has not one of the options."""
    from luthier.plugins.registry import installed_plugins
    from luthier.recipe.parts import find_part

    find_part(chosen, "exporter", "format", installed_plugins())


def check_rows(recipe: Recipe) -> None:
    """Raise what is wrong with the first rows of local files, if the libraries that prepare rows are installed."""
    if all(map(find_spec, ("numpy", "tokenizers", "jinja2"))):
        from luthier.data.first_look import check_first_rows

        check_first_rows(recipe)


def check_writable(folder: Path) -> None:
    """Raise `path-unwritable` if a folder is not writable and cannot be made. Folders made as a test are removed."""
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
    except ValueError as error:  # a character that a path cannot contain
        raise LuthierError("path-unwritable", str(error), where=str(folder)) from None


def locate_model(name: str) -> str:
    """Return the path that a name means: itself, or the folder of the run in `runs` with this id or name.

    Names that may be a hub's stay unchanged. Raises `model-not-found` for a path to nothing, with the runs that have
    similar names, and `run-ambiguous` for a name that several runs have.
    """
    from luthier.runs.find import find_exact_run

    path = Path(os.path.expanduser(name))
    if name == "demo" or path.exists():
        return name if path == Path(name) else str(path)
    run = find_exact_run(name, RUNS) if len(path.parts) == 1 else None
    if run is not None:
        return str(run.path)
    is_path = path.is_absolute() or name.startswith((".", "~", f"{RUNS}{os.sep}")) or len(path.parts) > 2
    names = _run_names(path)
    near = [names[name] for name in difflib.get_close_matches(path.name, names, n=2, cutoff=0.6 if is_path else NEAR)]
    if not is_path and not near:
        return name
    likely = " or ".join(dict.fromkeys(near))
    remedy = f"Did you mean {likely}?" if near else "Check the path; `luthier runs` lists the runs."
    raise LuthierError(
        "model-not-found", "there is no such folder, and no run of this name in runs", where=name, remedy=remedy
    )


def _run_names(path: Path) -> dict[str, str]:
    """Return the path of every run beside the path, and in `runs`, by the name of its folder and by its id."""
    from luthier.runs.find import is_run
    from luthier.runs.run_folder import read_folder

    places = [path.parent, RUNS] if len(path.parts) > 1 else [RUNS, Path()]
    runs = [run for place in places if place.is_dir() for run in place.iterdir() if run.is_dir() and is_run(run)]
    paths = {read_folder(run).run_id: str(run) for run in reversed(runs)}
    return {**paths, **{run.name: str(run) for run in reversed(runs)}}
