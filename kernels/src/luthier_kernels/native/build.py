"""Compilation of a C source into a shared library, once for each source, compiler and processor."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Final

from torch import Tensor

# no contraction: product and sum are rounded separately, as in torch
FLAGS: Final = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
                "-fPIC", "-shared")  # fmt: skip
WIDE: Final = "-mprefer-vector-width=512"  # compilers halve vectors by themselves, which costs a fifth in wide loops
SECONDS: Final = 120
log = logging.getLogger("luthier_kernels")


def has_native(source: str) -> bool:
    """Return True if the functions of `SOURCE.c` can be called here. The first call compiles them."""
    return load_source(source) is not None


@functools.cache
def native_function(source: str, name: str) -> Callable[..., None]:
    """Return the C function of this name, which takes tensors as their addresses (None: null), ints and bools as int64,
    floats as double.
    """
    library = load_source(source)
    assert library is not None, f"{source}.c is not compiled here; ask has_native first"
    function = getattr(library, name)
    function.restype = None

    def call(*arguments: Tensor | float | None) -> None:
        function(*map(_to_c, arguments))

    return call


@functools.cache
def load_source(source: str) -> ctypes.CDLL | None:
    """Load `SOURCE.c`, compiled or from the cache. Return None, and log why once, if that fails."""
    code = _read_source(source)
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        log.warning("no C compiler (cc, gcc, clang): %s runs in plain torch, more slowly", source)
        return None
    path = cache_folder() / f"{source}-{_fingerprint(code, compiler)}.so"
    try:
        if not path.is_file():
            _compile(code, compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning("%s.c cannot be compiled, so it runs in plain torch, more slowly: %s", source, said)
        return None


def _read_source(source: str) -> str:
    """Return the text of `SOURCE.c` with our headers inserted, so that the hash covers them."""
    folder = resources.files(__package__)
    text = folder.joinpath(f"{source}.c").read_text("utf-8")
    for header in ("rows.h", "vectors.h", "products.h"):
        text = text.replace(f'#include "{header}"', folder.joinpath(header).read_text("utf-8"))
    return text


def cache_folder() -> Path:
    """Return the folder of compiled sources, in LUTHIER_CACHE, or in `luthier` of XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("LUTHIER_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"
    return base / "native"


def compiler_flags() -> tuple[str, ...]:
    """Return the flags for this kind of processor; others than x86 do not know the width of vectors."""
    return (*FLAGS, WIDE) if platform.machine() in ("x86_64", "AMD64") else FLAGS


def _to_c(value: Tensor | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


def _compile(code: str, compiler: str, path: Path) -> None:
    """Write the library to a temporary file and rename it, so that no other process loads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder) / "source.c", Path(folder) / "made.so"
        source.write_text(code, "utf-8")
        words = [compiler, *compiler_flags(), str(source), "-o", str(made), "-lm"]
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=SECONDS)
        made.replace(path)


def _fingerprint(code: str, compiler: str) -> str:
    """Return a hash of source, compiler and processor features: machines may share a home folder."""
    words = [code, *compiler_flags(), _version(compiler), _processor()]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:20]


def _version(compiler: str) -> str:
    words = [compiler, "--version"]
    return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=True).stdout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    flags = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(flags)])
