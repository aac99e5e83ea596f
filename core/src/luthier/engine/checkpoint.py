"""Checkpoints: written aside, fsynced, renamed; found again newest first, and only where they are whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier.engine.state import load_state, save_state
from luthier.errors import LuthierError

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
FOLDER: Final = "checkpoints"
NAME: Final = re.compile(r"step-(\d{8})")


def save(run_folder: Path, step: int, tree: Mapping[str, Any], run: Mapping[str, str] | None = None) -> Path:
    """The folder `checkpoints/step-00000100`, complete or absent. A full disk leaves the earlier ones whole.

    `run` holds the hashes of the recipe and the data that it belongs to; None for none.
    """
    target = run_folder / FOLDER / f"step-{step:08d}"
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        files = save_state(tree, aside)
        manifest = {"format": FORMAT, "step": step, "run": dict(run or {}), "files": {f.name: digest(f) for f in files}}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        for file in (*files, aside / MANIFEST):
            sync(file)
        sync(aside)
        shutil.rmtree(target, ignore_errors=True)  # the same step of a run that was resumed before it
        os.replace(aside, target)
        sync(target.parent)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if is_full(error):
            raise LuthierError("disk-full", f"checkpoint of step {step} not written", where=str(target)) from error
        raise
    return target


def require(folder: Path, **run: str) -> None:
    """Raise `run-not-found` where a folder is no checkpoint, `checkpoint-corrupt` for one of another recipe or data."""
    if not (folder / MANIFEST).is_file():
        remedy = f"Give one, such as run/{FOLDER}/step-00000100."
        raise LuthierError("run-not-found", "there is no checkpoint here", where=str(folder), remedy=remedy)
    for name, found in _manifest(folder).get("run", {}).items():
        if run.get(name, found) != found:
            remedy = "Resume with the recipe and data of its own run, or train anew without resume."
            problem = f"the checkpoint belongs to a run with another {name}"
            raise LuthierError("checkpoint-corrupt", problem, where=str(folder), remedy=remedy)


def load(folder: Path) -> dict[str, Any]:
    """The tree of one checkpoint, its files compared with the manifest; `checkpoint-corrupt` where they differ."""
    where = str(folder)
    try:
        manifest = _manifest(folder)
        for name, expected in manifest["files"].items():
            if digest(folder / name) != expected:
                raise LuthierError("checkpoint-corrupt", f"{name} is damaged", where=where)
        return load_state(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LuthierError("checkpoint-corrupt", f"unreadable: {error}", where=where) from error


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        newer = manifest["format"] > FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LuthierError("checkpoint-corrupt", f"unreadable: {error}", where=str(folder)) from error
    if newer:
        remedy = "Use a newer luthier."
        raise LuthierError("checkpoint-corrupt", "written by a newer luthier", where=str(folder), remedy=remedy)
    return manifest


def steps(run_folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = (run_folder / FOLDER).glob("step-*") if (run_folder / FOLDER).is_dir() else ()
    return sorted(p for p in found if NAME.fullmatch(p.name))


def newest(run_folder: Path) -> tuple[Path, dict[str, Any], list[LuthierError]] | None:
    """The newest whole checkpoint with its tree, and the errors of damaged ones after it; None where there is none."""
    damaged: list[LuthierError] = []
    for folder in reversed(steps(run_folder)):
        try:
            return folder, load(folder), damaged
        except LuthierError as error:
            damaged.append(error)
    if damaged:
        raise damaged[0]
    return None


def prune(run_folder: Path, limit: int | None, best: Path | None) -> None:
    """Keep the newest `limit` checkpoints, and the best."""
    for folder in steps(run_folder)[: -limit if limit else 0]:
        if folder != best:
            going = folder.with_name(f".{folder.name}.going")  # renamed first: what is found by name is whole
            os.replace(folder, going)
            shutil.rmtree(going)


def tidy(run_folder: Path) -> None:
    """Remove what a killed process left half written."""
    for leftover in (*run_folder.glob(".*.[0-9]*"), *(run_folder / FOLDER).glob(".step-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """JSON written aside, fsynced, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(value, indent=2), "utf-8")
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room: a full disk, a quota, or a limit on file size."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return full or "No space left" in str(error) or any(f"os error {n}" in str(error) for n in (28, 27))
