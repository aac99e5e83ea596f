"""PEFT's files of an adapter, read and written: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from torch import Tensor

PEFT_CONFIG: Final = "adapter_config.json"
PEFT_WEIGHTS: Final = "adapter_model.safetensors"
PICKLED: Final = "adapter_model.bin"
FITS: Final = "Use the base model and the options that it was trained with."
# fields that say nothing about the tensors, whatever the method
COMMON: Final = frozenset({
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("runtime_config", "task_type"),
})  # fmt: skip


@attrs.frozen(kw_only=True)
class PeftFields:
    """The fields of adapter_config.json that an adapter understands.

    - `kinds`: the values of `peft_type` that it reads.
    - `types`: the types that a field's value has where it is not null; `bool` is no `int`.
    - `required`: the fields of `types` that must be given.
    - `neutral`: other fields that do not change what the tensors mean once their names and shapes fit.
    - `remedy`: advice for a file that uses any other field.
    """

    kinds: Sequence[str]
    types: Mapping[str, tuple[type, ...]]
    required: Collection[str] = ()
    neutral: Collection[str] = ()
    remedy: str = "Load it with PEFT."


def read_peft_config(folder: Path, fields: PeftFields) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Raises `artifact-not-found`, `file-damaged` for a file that is no JSON object, and `artifact-mismatch` for one that
    is of another type, lacks a field, has a value of a wrong type, or uses a field that the adapter does not know.
    """
    config, path = read_peft_object(folder), folder / PEFT_CONFIG
    kind = config.get("peft_type")
    if kind not in fields.kinds:
        problem = f"peft_type is {kind!r}, not {' or '.join(map(repr, fields.kinds))}"
        raise peft_misfit(path, problem, "Use the adapter that made it.")
    for name in fields.required:
        if config.get(name) is None:
            raise peft_misfit(path, f"it lacks {name}", "Copy the file again.")
    for name, types in fields.types.items():
        if config.get(name) is not None and type(config[name]) not in types:
            names = " or ".join(one.__name__ for one in types)
            raise peft_misfit(path, f"{name} is {config[name]!r}, and not of type {names}", "Copy the file again.")
    unknown = [n for n in sorted(config.keys() - COMMON - fields.types.keys() - set(fields.neutral)) if config[n]]
    if unknown:
        raise peft_misfit(path, f"it uses {unknown[0]}: {config[unknown[0]]!r}", fields.remedy)
    return config


def read_peft_object(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json, of any method. Raises `artifact-not-found` or `file-damaged`."""
    path = folder / PEFT_CONFIG
    if not path.is_file():
        problem = f"no {PEFT_CONFIG} in this folder" if folder.is_dir() else "there is no such folder"
        raise LuthierError("artifact-not-found", problem, where=str(folder))
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise damaged_file(path, f"it cannot be read: {error}", "Make it readable, or copy it again.") from None
    except (ValueError, RecursionError) as error:
        raise damaged_file(path, f"not JSON: {error}") from None
    if not isinstance(config, dict):
        problem = f"a JSON object is expected, and this is a {type(config).__name__}"
        raise damaged_file(path, problem)
    return config


def read_peft_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of adapter_model.safetensors. Raises `artifact-not-found` or `file-damaged`."""
    from safetensors.torch import load_file

    path = folder / PEFT_WEIGHTS
    if not path.is_file():
        pickled = (folder / PICKLED).is_file()
        remedy = "Save it as safetensors: a .bin file is a pickle, which can run code." if pickled else None
        raise LuthierError("artifact-not-found", f"no {PEFT_WEIGHTS} in this folder", where=str(folder), remedy=remedy)
    try:
        return load_file(path)
    except Exception as error:  # whatever the library raises, as a file may hold anything
        raise damaged_file(path, f"not a whole safetensors file: {error!r}") from None


def write_peft_files(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files. The tensors are contiguous, on the CPU, and share no memory."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def damaged_file(path: Path, problem: str, remedy: str | None = None) -> LuthierError:
    """Return the error for a file that cannot be read as what it is."""
    return LuthierError("file-damaged", problem, where=str(path), remedy=remedy)


def peft_misfit(path: Path, problem: str, remedy: str = FITS) -> LuthierError:
    """Return the error for a file that does not fit an adapter, with the file as its place."""
    return LuthierError("artifact-mismatch", problem, where=str(path), remedy=remedy)
