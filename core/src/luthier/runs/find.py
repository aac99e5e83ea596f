"""The search for runs: every run folder below a directory, or the one that an abbreviated id or a path means."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from luthier.errors import LuthierError
from luthier.recipe.artifact_note import ARTIFACTS
from luthier.runs.run_folder import CHECKPOINTS, LOCK, RECORD, RunFolder, read_folder

DEEP: Final = 3  # levels of folders between a directory and a run in it
NEAR: Final = 0.6  # the share of letters that a name has in common with one that is proposed
LISTED: Final = 5  # the most runs that an error names


def all_runs(directory: Path) -> list[RunFolder]:
    """Return the runs in and below a directory, the newest first and damaged ones last."""
    folders = [read_folder(path) for path in _folders(directory, DEEP)]
    folders.sort(key=lambda run: run.name)
    # an id begins with the time at which the run began
    return sorted(folders, key=lambda run: run.run_id, reverse=True)


def find_run(name: str, directory: Path) -> RunFolder:
    """Return the run at a path, or the run with an id or name, which may be abbreviated.

    Raises `run-not-found`, and `run-ambiguous` with the runs that match.
    """
    if is_run(Path(name)):
        return read_folder(Path(name))
    runs = all_runs(directory)
    for fits in (_equal, _begins, _contains):
        matching = [run for run in runs if fits(run, name)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise _ambiguous(name, matching)
    raise LuthierError("run-not-found", f"no run {name!r} in {directory}", remedy=_near_runs(name, runs))


def find_exact_run(name: str, directory: Path) -> RunFolder | None:
    """Return the run in or below a directory whose id or name this is; None if there is none.

    Raises `run-ambiguous` with the runs that match.
    """
    matching = [run for run in all_runs(directory) if _equal(run, name)]
    if len(matching) > 1:
        raise _ambiguous(name, matching)
    return matching[0] if matching else None


def is_run(folder: Path) -> bool:
    """Return True if a folder holds a run, or the remains of one."""
    return (folder / RECORD).exists() or (folder / LOCK).is_file() or (folder / CHECKPOINTS).is_dir()


def describe_folder(folder: Path) -> str | None:
    """Return a sentence on what a folder without a model is, and what to name instead; None for an unknown folder."""
    if folder.parent.name == CHECKPOINTS:
        return f"It is a run's checkpoint, which is no model yet: `luthier merge {folder}` makes one of it."
    if is_run(folder):
        paths = [folder / name for name in ARTIFACTS if (folder / name).is_dir()]
        if [path.name for path in paths] == ["adapter"]:
            return f"It is a run's folder, whose adapter is in no model: `luthier merge {folder}` makes one of it."
        return f"It is a run's folder: give {paths[-1]}." if paths else "It is a run's folder, without a model yet."
    if (folder / "adapter_config.json").is_file():
        return "It holds an adapter in PEFT's layout: name the model that it was trained on."
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if folder.name == CHECKPOINTS and inner:
        return f"It holds a run's checkpoints: give the run's folder, or {inner[-1]}."
    kinds = {"runs": [*filter(is_run, inner)], "models": [path for path in inner if (path / "config.json").is_file()]}
    return next((f"It holds {kind}: give one of them, such as {paths[-1]}." for kind, paths in kinds.items() if paths),
                None)  # fmt: skip


def _near_runs(name: str, runs: list[RunFolder]) -> str:
    """Return a hint that names the runs whose names or ids are like `name`, the newest run if none is."""
    if not runs:
        return "Give a run's folder, or its directory with --dir."
    words = {word: run for run in reversed(runs) for word in (run.run_id, run.name) if word}
    near = difflib.get_close_matches(Path(name).name, words, n=LISTED, cutoff=NEAR)
    if near:
        return f"Did you mean {' or '.join(dict.fromkeys(words[word].name for word in near))}?"
    return f"The newest is {runs[0].name}; `luthier runs` lists them all."


def _folders(folder: Path, deep: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return
    for path in inner if deep else ():
        yield from _folders(path, deep - 1)


def _equal(run: RunFolder, name: str) -> bool:
    return name in (run.run_id, run.name)


def _begins(run: RunFolder, name: str) -> bool:
    return run.run_id.startswith(name) or run.name.startswith(name)


def _contains(run: RunFolder, name: str) -> bool:
    return name in run.run_id or name in run.name


def _ambiguous(name: str, matching: list[RunFolder]) -> LuthierError:
    shown = [f"{run.run_id} ({run.path})" for run in matching[:LISTED]]
    more = f" and {len(matching) - LISTED} more" if len(matching) > LISTED else ""
    problem = f"{name!r} may be {' or '.join(shown)}{more}"
    return LuthierError("run-ambiguous", problem)
