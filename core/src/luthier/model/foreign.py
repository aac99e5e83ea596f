"""Foreign readers: whatever another library raises while it reads a model is one error of ours, with file and cause."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from luthier.errors import LuthierError

SHOWN: Final = 400  # the most characters of another library's message
PLAIN: Final = (OSError, ValueError, ImportError)  # errors whose messages say enough without their type
OBJECTS: Final = (  # files that each contain a JSON object, in the order in which they are read
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "adapter_config.json",
)
SAFETENSORS: Final = ".safetensors"
PICKLED: Final = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth")


@contextmanager
def explain_reading(
    source: str | Path, code: str = "model-not-found", *, file: str = "", said: str = "", remedy: str | None = None
) -> Iterator[None]:
    """Raise an error of `code` for whatever is raised inside, or `file-damaged` where a file of `source` is broken.

    Where no file is to blame it is `file` in the folder that is named, and `said` goes before the cause. A device whose
    memory ran out is told of elsewhere, and so as it is.
    """
    try:
        yield
    except (LuthierError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        problem = f"{said}: {describe_error(error)}" if said else describe_error(error)
        broken = find_broken_file(Path(source), code)
        raise broken or LuthierError(code, problem, where=locate_file(source, file), remedy=remedy) from error


def locate_file(source: str | Path, file: str) -> str:
    """Return the path of a file in a model's folder; the model's name where it is no folder, or has none such."""
    return str(Path(source) / file) if file and (Path(source) / file).is_file() else str(source)


def describe_error(error: BaseException) -> str:
    """Return an error of another library as a sentence: its first line, or all of it where that announces the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines) if lines[0].endswith(":") else lines[0]
    text = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
    return text if text and isinstance(error, PLAIN) else f"{type(error).__name__}: {text}".removesuffix(": ")


def find_broken_file(folder: Path, code: str) -> LuthierError | None:
    """Return what is wrong with the first file of a model's folder that cannot be read as what it is; None: nothing.

    `folder` may also be one file of weights. Of weights the headers alone are read. `code` is that of pickled ones.
    """
    for path in (folder / name for name in OBJECTS if (folder / name).is_file()):
        problem = _object_problem(path)
        if problem is not None:
            return LuthierError("file-damaged", problem, where=str(path), remedy="Correct it, or copy the file again.")
    for path in [folder] if folder.suffix == SAFETENSORS else sorted(folder.glob(f"*{SAFETENSORS}")):
        problem = _header_problem(path)
        if problem is not None:
            return LuthierError("file-damaged", problem, where=str(path))
    pickled = sorted(path for kind in PICKLED for path in folder.glob(kind))
    if pickled and not any(folder.glob(f"*{SAFETENSORS}")):
        problem = "the weights are pickled, which Luthier does not read: a pickle may run anything"
        remedy = "Save the model with transformers' save_pretrained, which writes safetensors."
        return LuthierError(code, problem, where=str(pickled[0]), remedy=remedy)
    return None


def check_files(source: str, code: str = "model-not-found") -> None:
    """Raise where a file of a model's folder is broken, or its weights are pickled; a hub name is not looked at."""
    broken = find_broken_file(Path(source), code) if Path(source).is_dir() else None
    if broken is not None:
        raise broken


def _object_problem(path: Path) -> str | None:
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"not JSON: {describe_error(error)}"
    return None if isinstance(content, dict) else f"a JSON object is expected, and this is a {type(content).__name__}"


def _header_problem(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return None
    except (OSError, ValueError, SafetensorError) as error:
        return describe_error(error)
