"""Isolation: what a plugin builds lazily during a rehearsal on fake tensors does not outlive it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

from torch.utils._python_dispatch import _disable_current_modes

from luthier.memory.lazy_values import Kept, list_kept

SHARED: Final = frozenset(  # packages that belong to no plugin and are always there in a rehearsal
    (
        *sys.stdlib_module_names,
        "accelerate",
        "attr",
        "attrs",
        "luthier",
        "numpy",
        "safetensors",
        "torch",
        "transformers",
    )
) - {"__main__"}

LATE: Final[set[str]] = set()  # packages that functions of a part imported during a rehearsal


@contextmanager
def isolated_parts(parts: Iterable[Any], packages: Iterable[str] = ()) -> Iterator[None]:
    """Give the modules of parts back, afterwards, what they held before: globals, caches, attributes of their classes.

    Tables that a part builds at its first use, and numbers that it takes from them, would otherwise be fake for the
    rest of the process. `packages` are those of all plugins, which parts may use. What is imported meanwhile is
    executed with real tensors.
    """
    watched = {type(part).__module__.partition(".")[0] for part in parts}.union(packages, LATE) - SHARED
    watched = watched | _used_by(watched)
    finder = RealImports(watched)
    for module in _loaded(watched):
        finder.keep(module)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for snapshot in finder.kept:
            snapshot.restore()


class RealImports(MetaPathFinder):
    """A finder that has modules executed outside of the rehearsal, and notes what those of a plugin then hold."""

    def __init__(self, watched: set[str]) -> None:
        self.watched = watched
        self.kept: list[Kept] = []
        self._seen: set[int] = set()

    def keep(self, module: ModuleType) -> None:
        """Note what a module holds."""
        self.kept += list_kept(module, self.watched, self._seen)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find, with a loader of ours around theirs; None for what is shared by all."""
        if name.partition(".")[0] in SHARED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = RealLoader(spec.loader, self)
        return spec


class RealLoader(Loader):
    """A loader that hands over to the module's own, so that nothing of it is seen afterwards."""

    def __init__(self, own: Any, finder: RealImports) -> None:
        self.own, self.finder = own, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with real tensors."""
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        with _disable_current_modes():
            self.own.exec_module(module)
        package = module.__name__.partition(".")[0]
        self.finder.watched.add(package)
        LATE.add(package)
        self.finder.keep(module)


def _loaded(packages: set[str]) -> list[ModuleType]:
    return [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in packages and type(m) is ModuleType]


def _used_by(packages: set[str]) -> set[str]:
    """Return the packages that modules of these have names from, and that use torch themselves."""
    owners: set[str] = set()
    for module in _loaded(packages):
        for value in list(vars(module).values()):
            owner = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(owner, str):
                owners.add(owner.partition(".")[0])
    unknown = owners - packages - SHARED
    return {name for name in unknown if any("torch" in vars(module) for module in _loaded({name}))}
