"""Checkpoints: written aside, fsynced, renamed; found again newest first, and only where they are whole.

A writer of its own (a sharded one, say) fills the folder that `prepare_folder` gives and hands it to `commit_folder`.
Importing this loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luthier.checkpoint.format import FORMAT
from luthier.disk import digest_file, digest_text, is_full, is_intact, settle_folder, sync_path
from luthier.errors import LuthierError, refuse_newer
from luthier.logs import get_logger
from luthier.runs.writing import save_requests as requests

if TYPE_CHECKING:
    from luthier.runs.writing.target import Place

log = get_logger()
MANIFEST: Final = "manifest.json"
FOLDER: Final = "checkpoints"
ASIDE: Final = "set-aside"
CONSTANTS: Final = "constants"  # the run's folder of frozen tensors; see `checkpoint.constants`
NAME: Final = re.compile(r"step-(\d{8,})")
GOING, REPLACED = "going", "replaced"  # suffixes of an old folder: while it is removed, and while it is replaced


def save(run_folder: Path, step: int, tree: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> Path:
    """Write the folder `checkpoints/step-00000100`, complete or not at all. A full disk leaves the earlier ones whole.

    `run` says what run it belongs to (see `changes`); None for none.
    """
    from luthier.state_tree import take_snapshot

    return write_checkpoint(run_folder, step, take_snapshot(tree, copy=False).write, run)


def write_checkpoint(
    run_folder: Path,
    step: int,
    fill: Callable[[Path], object],
    run: Mapping[str, Any] | None = None,
    constants: Iterable[str] = (),
) -> Path:
    """Write a checkpoint like `save`, with files made by `fill`; `constants` are files of the run that it needs."""
    with _room(run_folder, step):
        aside = prepare_folder(run_folder, step)
        try:
            fill(aside)
            return commit_folder(aside, run, constants)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def prepare_folder(run_folder: Path, step: int) -> Path:
    """Return an empty temporary folder for the files of a checkpoint after `step`; nothing reads it before it is"""
    aside = folder_of(run_folder, step).with_name(f".step-{step:08d}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def commit_folder(aside: Path, run: Mapping[str, Any] | None = None, constants: Iterable[str] = ()) -> Path:
    """Make the filled folder a checkpoint: hash every file, write the manifest, fsync all, rename. Gives its place."""
    target = aside.with_name(aside.name.split(".")[1])
    step = int(NAME.fullmatch(target.name)[1])  # type: ignore[index]  # prepare_folder has named it
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    digests = {file.relative_to(aside).as_posix(): digest_file(file) for file in files}
    manifest = {
        "format": FORMAT,
        "step": step,
        "run": dict(run or {}),
        "files": digests,
        "constants": sorted(constants),
    }
    manifest["luthier"] = metadata.version("luthier")
    (aside / MANIFEST).write_text(json.dumps({**manifest, "digest": _own_digest(manifest)}, indent=1), "utf-8")
    settle_folder(aside)
    old = target.with_name(f".{target.name}.{REPLACED}")
    if target.exists():  # left by the run before it was resumed; put back if a kill comes between
        os.replace(target, old)
    os.replace(aside, target)
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target


@contextmanager
def _room(run_folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        where = str(folder_of(run_folder, step))
        raise LuthierError("disk-full", f"checkpoint of step {step} not written", where=where) from error


def folder_of(run_folder: Path, step: int) -> Path:
    """Return where the checkpoint after `step` lies, or would."""
    return run_folder / FOLDER / f"step-{step:08d}"


def require_checkpoint(folder: Path) -> dict[str, Any]:
    """Return what run a checkpoint belongs to; `run-not-found` where a folder is none."""
    if not (folder / MANIFEST).is_file():
        remedy = f"Give one, such as run/{FOLDER}/step-00000100."
        raise LuthierError("run-not-found", "there is no checkpoint here", where=str(folder), remedy=remedy)
    return read_manifest(folder)["run"]


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the tree of one checkpoint, in today's layout. Raises `checkpoint-corrupt` if a file was changed."""
    from luthier.checkpoint.migrations import migrate_tree
    from luthier.state_tree import load_state

    manifest = verify(folder)
    try:
        batch = manifest["run"].get("settings", {}).get("global_batch_size")
        return migrate_tree(load_state(folder), manifest["format"], batch)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(folder, f"unreadable: {error}") from error


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest, once every file that it names has been compared with it; `checkpoint-corrupt` where one
    differs.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        try:
            intact = is_intact(folder / name, expected)
        except (OSError, AttributeError) as error:  # the manifest has no checksum, so its contents may be anything
            raise _corrupt(folder, f"unreadable: {error}") from error
        if not intact:
            raise _corrupt(folder, f"{name} is damaged")
    for name in manifest.get("constants", ()):
        if not (folder.parents[1] / CONSTANTS / name).is_file():
            raise _corrupt(folder, f"{CONSTANTS}/{name} is missing in the run's folder")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself, without a look at its files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        refuse_newer(manifest, FORMAT, folder)
        form, run, files = manifest["format"], manifest["run"], manifest["files"]
        own = manifest.pop("digest", None)
        whole = isinstance(form, int) and isinstance(run, dict) and isinstance(files, dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(folder, f"unreadable: {type(error).__name__}: {error}") from error
    if not whole or (form > 1 and own != _own_digest(manifest)):
        raise _corrupt(folder, f"{MANIFEST} is damaged")
    return manifest


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return digest_text(json.dumps(manifest, sort_keys=True))


def _corrupt(folder: Path, problem: str) -> LuthierError:
    return LuthierError("checkpoint-corrupt", problem, where=str(folder))


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    folders = (run_folder / FOLDER).glob("step-*") if (run_folder / FOLDER).is_dir() else ()
    return sorted((p for p in folders if NAME.fullmatch(p.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint folder was written."""
    return int(folder.name.removeprefix("step-"))


def newest_checkpoint(run_folder: Path) -> tuple[Path, dict[str, Any], list[LuthierError]] | None:
    """Return the newest whole checkpoint with its tree, and the errors of damaged ones after it; None where there is
    none.
    """
    damaged: list[LuthierError] = []
    for folder in reversed(list_checkpoints(run_folder)):
        try:
            return folder, load_checkpoint(folder), damaged
        except LuthierError as error:
            if error.code == "format-newer":  # it is whole, and of a later step than those before it
                raise
            damaged.append(error)
    if damaged:
        problem, remedy = f"{damaged[0].problem}, and no other is whole", "Start anew with --fresh."
        raise LuthierError("checkpoint-corrupt", problem, where=damaged[0].where, remedy=remedy)
    return None


def find_orphan(place: Place) -> Path | None:
    """Return the newest checkpoint of a run whose run.json is lost, from which it goes on; None for other runs."""
    for folder in reversed(known_checkpoints(place.folder)) if place.record is None else ():
        with contextlib.suppress(LuthierError):
            read_manifest(folder)
            log.warning("run.json is missing: the run goes on from its checkpoint", checkpoint=str(folder))
            return folder
    return None


def known_checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first. Raises `format-newer` if one is for a newer luthier only.

    An older one is not trained on from then, and nothing in the folder is touched.
    """
    folders = list_checkpoints(run_folder)
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            refuse_newer(manifest if isinstance(manifest, dict) else {}, FORMAT, folder)
    return folders


def prune_checkpoints(run_folder: Path, limit: int | None, best: Path | None) -> None:
    """Keep the newest `limit` checkpoints, and the best."""
    for folder in list_checkpoints(run_folder)[: -limit if limit else 0]:
        if folder != best:
            # renamed first, because a folder with a checkpoint's name must be whole
            going = folder.with_name(f".{folder.name}.{GOING}")
            os.replace(folder, going)
            shutil.rmtree(going)


def set_aside(run_folder: Path, step: int) -> list[Path]:
    """Move what lies after `step` to the folder `set-aside`: damaged ones, and those of steps that are taken anew.

    They would count as the newest, to be kept in the place of better ones.
    """
    moved = []
    for folder in list_checkpoints(run_folder):
        if step_of(folder) > step:
            place = run_folder / ASIDE / folder.name
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(folder, place)
            moved.append(place)
    return moved


def tidy_checkpoints(run_folder: Path) -> None:
    """Put back what gave way to a checkpoint that was not finished, and remove what a killed process left aside."""
    for old in (run_folder / FOLDER).glob(f".step-*.{REPLACED}"):
        target = old.with_name(old.name.split(".")[1])
        if not target.exists():
            os.replace(old, target)
    requests.answer_request(run_folder)
    for leftover in (*run_folder.glob(".*.[0-9]*"), *(run_folder / FOLDER).glob(".step-*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink()
