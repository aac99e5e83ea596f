"""Register an export in Ollama, by its own command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from luthier import LuthierError

WHERE: Final = "gguf.ollama"
REMEDY: Final = "Start Ollama (`ollama serve`), or leave the option out and run `ollama create` later."


def check_ollama() -> None:
    """Raise `gguf:ollama` if Ollama is not installed here, or its server does not answer."""
    _call_ollama("list")


def register_model(name: str, modelfile: Path) -> None:
    """Make a model of this name in Ollama, which copies the file that the Modelfile names. Raises `gguf:ollama`."""
    _call_ollama("create", name, "-f", str(modelfile))


def _call_ollama(*words: str) -> None:
    program = shutil.which("ollama")
    if program is None:
        raise LuthierError("gguf:ollama", "the program `ollama` is not on the PATH", where=WHERE, remedy=REMEDY)
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise LuthierError("gguf:ollama", f"`ollama {words[0]}` failed: {said[-1]}", where=WHERE, remedy=REMEDY)
