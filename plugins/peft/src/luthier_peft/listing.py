"""List the methods of the installed PEFT, read from its files without importing them."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from luthier import LuthierError


@functools.cache
def config_names() -> dict[str, str]:
    """Return method -> name of its config class, for every method of the installed PEFT that changes layers.

    Importing PEFT and torch takes seconds, and listing parts must be fast. So the registrations are read from PEFT's
    source: each folder of `peft/tuners` calls `register_peft_method(name=, config_cls=, ...)` in its `__init__.py`. A
    folder without `layer.py` has a prompt method (or a second network), which changes no layer. No method is named
    here, so that another version of PEFT lists its own.
    """
    folders = sorted(init.parent for init in _tuners().glob("*/__init__.py"))
    return dict(pair for folder in folders if (folder / "layer.py").exists() for pair in _registered(folder))


def _tuners() -> Path:
    """Return PEFT's folder of methods. `find_spec` of a top-level package does not import it."""
    spec = importlib.util.find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        raise LuthierError("dependency-missing", "PEFT is not installed", remedy='pip install "peft>=0.21"')
    return Path(spec.submodule_search_locations[0]) / "tuners"


def _registered(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (method, config class) of each `register_peft_method` call in a folder's `__init__.py`."""
    source = (folder / "__init__.py").read_text("utf-8")
    if "register_peft_method" not in source:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register_peft_method":
            given = {k.arg: k.value for k in node.keywords}
            name, config = given.get("name"), given.get("config_cls")
            if isinstance(name, ast.Constant) and isinstance(config, ast.Name):
                yield str(name.value), config.id
