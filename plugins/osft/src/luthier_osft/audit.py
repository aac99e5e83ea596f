"""Audit a finished checkpoint: how much of every weight's change is in protected directions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from luthier import LuthierError, find_model_folder
from safetensors import safe_open
from torch import Tensor

from luthier_osft.files import CONFIG, is_later_task, read_config
from luthier_osft.ranks import fixed_rank

EXACT: Final = 1e-6  # rounding error of float32 in a share
INDEX: Final = "model.safetensors.index.json"
LATER: Final = (
    "This run is a later task of a sequence: it keeps directions of the model that the task before has left, not of "
    "the first base. Name the run of the task before as BASE."
)
PERHAPS_LATER: Final = (
    "Each task of a sequence keeps directions of the model from which it began: if several tasks were trained, "
    "compare each with the one before it."
)


@attrs.frozen(kw_only=True)
class LayerAudit:
    """The audit of one weight: the relative size of its change, and the share of the change in protected directions.

    `left` and `right` are the shares in its first `preserved` left and right singular directions. `bound` is the
    largest share that the rounding of the new weight to its dtype can cause.
    """

    name: str
    preserved: int
    change: float
    left: float
    right: float
    bound: float

    @property
    def holds(self) -> bool:
        """True if rounding explains all change in protected directions."""
        return max(self.left, self.right) <= self.bound


@attrs.frozen(kw_only=True)
class Audit:
    """The audit of a model: its changed matrices, and the changed tensors that nothing protects.

    A later task of a sequence preserves directions of the model that the task before has left.
    """

    layers: list[LayerAudit]
    unprotected: list[str]
    later_task: bool = False  # the adapter's files say that other tasks were trained before

    @property
    def holds(self) -> bool:
        """True if every protected weight kept its directions."""
        return all(layer.holds for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        layers = [{**attrs.asdict(layer), "holds": layer.holds} for layer in self.layers]
        return {
            "holds": self.holds, "layers": layers, "unprotected": self.unprotected, "later_task": self.later_task,
        }  # fmt: skip


def audit_model(base: Path, model: Path, ratio: float | None = None) -> Audit:
    """Compare a model with the one that it was trained from, both in transformers' layout.

    Each is a folder of weights, `demo`, a name of the hub whose files are on this machine, or a run with `merge: true`.
    The adapter of a run says how much each layer preserves. Without an adapter, `ratio` is the share of directions
    that trained, in every matrix except embeddings and head.
    """
    base, model = (find_model_folder(str(path)) for path in (base, model))
    folder, ranks = _trained_folder(model, ratio)
    before, after = _files_of(_weights_folder(base)), _files_of(folder)
    layers, unprotected = [], []
    for name in sorted(before.keys() & after.keys()):
        old, new = _read(before[name], name), _read(after[name], name)
        if old.shape != new.shape:
            problem = f"{name} has shape {list(old.shape)} there, {list(new.shape)} here"
            raise LuthierError(
                "artifact-mismatch", problem, where=str(folder), remedy="Name the base from which it was trained."
            )
        if torch.equal(old.double(), new.double()):
            continue
        rank = ranks.get(name) if ranks is not None else _rank_of(name, old, ratio)
        if rank is None:
            unprotected.append(name)
        else:
            layers.append(audit_weight(name, old, new, rank))
    if not layers and not unprotected:
        raise LuthierError("artifact-mismatch", "no tensor differs from the base", where=str(folder),
                           remedy="Name the trained model second, and the base first.")  # fmt: skip
    later = ranks is not None and is_later_task(model / "adapter")
    return Audit(layers=layers, unprotected=unprotected, later_task=later)


def audit_weight(name: str, old: Tensor, new: Tensor, rank: int) -> LayerAudit:
    """Return the shares of a weight's change in its first `rank` singular directions, computed in float64."""
    u, _, v = torch.linalg.svd(old.double(), full_matrices=False)
    change = new.double() - old.double()
    size, whole = float(change.norm()), float(new.double().norm())
    rounding = 0.5 * max(torch.finfo(new.dtype).eps, torch.finfo(torch.float32).eps)
    return LayerAudit(
        name=name,
        preserved=rank,
        change=size / max(float(old.double().norm()), 1e-30),
        left=float((u[:, :rank].T @ change).norm()) / size,
        right=float((change @ v[:rank].T).norm()) / size,
        bound=max(EXACT, rounding * whole / size),
    )


def format_audit(audit: Audit) -> Iterator[str]:
    """Yield the lines of a table, and a summary."""
    yield f"{'weight':48} {'kept':>6} {'change':>9} {'left':>9} {'right':>9} {'bound':>9}"
    for layer in audit.layers:
        numbers = " ".join(f"{n:9.2g}" for n in (layer.change, layer.left, layer.right, layer.bound))
        yield f"{layer.name:48} {layer.preserved:6} {numbers}{'' if layer.holds else '  <- moved'}"
    if audit.unprotected:
        yield f"changed without protection: {', '.join(audit.unprotected)}"
    moved = sum(not layer.holds for layer in audit.layers)
    yield f"{len(audit.layers)} weights: " + ("all keep their directions" if audit.holds else f"{moved} have moved")
    if not audit.holds:
        yield LATER if audit.later_task else PERHAPS_LATER


def _weights_folder(base: Path) -> Path:
    """Return the folder of a base's weights, which may be a run of an earlier task."""
    if not (base / "adapter" / CONFIG).is_file():
        return base
    return _merged_folder(base)


def _merged_folder(run: Path) -> Path:
    if not (run / "merged").is_dir():
        problem = "the run has no merged model"
        raise LuthierError("artifact-not-found", problem, where=str(run), remedy=f"Run: luthier merge {run}")
    return run / "merged"


def _trained_folder(model: Path, ratio: float | None) -> tuple[Path, dict[str, int] | None]:
    """Return the folder of the weights, and the preserved directions of each tensor, if an adapter says so."""
    if not model.is_dir():
        raise LuthierError("artifact-not-found", "there is no such folder", where=str(model), remedy="Check the path.")
    if (model / "adapter" / CONFIG).is_file() and ratio is None:
        layers = read_config(model / "adapter")["layers"]
        return _merged_folder(model), {f"{name}.weight": layer["preserved"] for name, layer in layers.items()}
    if ratio is None:
        remedy = "Give --unfreeze-rank-ratio, or the folder of a run with merge: true."
        raise LuthierError("recipe-missing", "the preserved share is not known", where=str(model), remedy=remedy)
    return _weights_folder(model), None


def _rank_of(name: str, weight: Tensor, ratio: float | None) -> int | None:
    is_matrix = weight.dim() == 2 and not any(word in name for word in ("embed", "lm_head", "wte", "wpe"))
    return fixed_rank(min(weight.shape), ratio) if is_matrix and ratio is not None else None


def _files_of(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    if (folder / INDEX).is_file():
        listed = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        return {name: folder / file for name, file in listed.items()}
    path = folder / "model.safetensors"
    if not path.is_file():
        remedy = "Name a folder of weights, a run with merge: true, or a model whose files are on this machine."
        problem = "no model.safetensors in this folder"
        raise LuthierError("artifact-not-found", problem, where=str(folder), remedy=remedy)
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)
