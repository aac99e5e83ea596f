"""The record of a run, run.json: what it holds, and how it is read and written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from luthier.disk import write_json
from luthier.errors import LuthierError, refuse_newer
from luthier.timestamp import current_time

RECORD: Final = "run.json"
FORMAT: Final = 1  # of run.json: a number that grows where a reader of the last one would go wrong
RECIPE: Final = "recipe.yaml"
LIBRARIES: Final = ("luthier", "torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets")


def new_id() -> str:
    """Return a new run id: the time, and four random characters."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + os.urandom(2).hex()


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the contents of run.json, or None if the folder holds no run. Raises if the file is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(record, dict):
        raise _damaged(folder, f"it holds a {type(record).__name__}, not an object")
    refuse_newer({"luthier": (record.get("versions") or {}).get("luthier"), **record}, FORMAT, folder)
    return record


def _damaged(folder: Path, problem: str) -> LuthierError:
    remedy = "Restore the file, or remove it if the run's checkpoints are whole: the run then goes on from them."
    return LuthierError("run-not-found", f"{RECORD} is damaged: {problem}", where=str(folder), remedy=remedy)


def require_entries(folder: Path, record: dict[str, Any], names: Iterable[str]) -> None:
    """Raise `run-not-found` if a run's record lacks entries that its writer always writes."""
    missing = [name for name in names if not isinstance(record.get(name), str)]
    if missing:
        raise _damaged(folder, f"it has no {' and no '.join(missing)}")


def write_record(folder: Path, record: dict[str, Any], **changes: Any) -> None:
    """Update run.json, on disk and in memory."""
    record.update(changes, format=FORMAT, updated=current_time())
    write_json(folder / RECORD, strict_json(record))


def strict_json(value: Any) -> Any:
    """Return a value that JSON can hold: JSON has no NaN, so a loss that is NaN becomes null."""
    if isinstance(value, dict):
        return {name: strict_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [strict_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record_environment(device: str) -> dict[str, Any]:
    """Return what else decides the numbers of a run: versions, processor, threads, and luthier's own variables."""
    import torch

    return {
        "versions": library_versions(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": device,
        "threads": torch.get_num_threads(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("LUTHIER_", "OMP_", "MKL_"))},
    }


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide a run's numbers."""
    known = {d: _version(d) for d in LIBRARIES}
    return {"python": platform.python_version(), **{d: v for d, v in known.items() if v}}


def _version(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None
