"""Constants: frozen tensors of a run, written once, in files that are named by their content.

They lie in the folder `constants` of the run. Each checkpoint names the files that it needs in its manifest and in its
state, so that a resume finds them, and a run that goes on from another run's checkpoint copies them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luthier.checkpoint.folder import CONSTANTS as FOLDER
from luthier.disk import sync_path
from luthier.distributed.broadcast import broadcast_tree
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.model.weights.shard_tensors import whole_tensor
from luthier.step.setup import ConstantOwner

if TYPE_CHECKING:
    from torch import Tensor

DIGITS: Final = 32  # digits of a file's SHA-256 that are part of its name
PIECE: Final = 1 << 20  # bytes that are read at once


def write_constants(run_folder: Path, owner: str, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors where they are not there yet, and return the file's name, `owner-<hash>.safetensors`."""
    from safetensors.torch import save_file

    folder = run_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{owner}.{os.getpid()}"
    save_file({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, aside)
    name = f"{owner}-{hash_file(aside)}.safetensors"
    if (folder / name).exists():
        aside.unlink()
        return name
    aside.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read
    sync_path(aside)
    os.replace(aside, folder / name)
    sync_path(folder)
    return name


def read_constants(run_folder: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of a file; `checkpoint-corrupt` where it is missing or not what its name says."""
    from safetensors.torch import load_file

    path = run_folder / FOLDER / name
    if not path.is_file():
        raise LuthierError("checkpoint-corrupt", "a file of constants is missing", where=str(path))
    if hash_file(path) != path.stem.rpartition("-")[2]:
        raise LuthierError("checkpoint-corrupt", "a file of constants is damaged", where=str(path))
    return load_file(path)


def copy_constants(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files of constants from one run's folder to another's, where they are not there yet."""
    for name in names:
        source_file, place = source / FOLDER / name, target / FOLDER / name
        if place.exists() or not source_file.is_file():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = place.with_name(f".{name}.{os.getpid()}")
        shutil.copyfile(source_file, aside)
        sync_path(aside)
        os.replace(aside, place)


def hash_file(path: Path) -> str:
    """Return the first digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()[:DIGITS]


def store_constants(run_folder: Path, owners: Mapping[str, ConstantOwner], world: World) -> dict[str, str]:
    """Write the constants of every owner that has any, and return the files by owner. It is collective."""
    files = {}
    for name, owner in owners.items():
        tensors = {key: whole_tensor(tensor) for key, tensor in owner.constants().items()}
        if world.any(bool(tensors)):
            files[name] = world.decide(_writing(run_folder, name, tensors))
    return files


def _writing(run_folder: Path, owner: str, tensors: Mapping[str, Tensor]) -> Any:
    return lambda: write_constants(run_folder, owner, tensors)


def restore_constants(
    run_folder: Path, files: Mapping[str, str], owners: Mapping[str, ConstantOwner], world: World, source: Path
) -> None:
    """Give every owner its constants back; those of another run's folder `source` are copied. It is collective."""
    if world.is_main and source != run_folder:
        copy_constants(source, run_folder, files.values())
    for name, file in files.items():
        tensors = broadcast_tree(world, lambda file=file: read_constants(run_folder, file))  # type: ignore[misc]
        if name in owners:
            owners[name].load_constants(tensors)
