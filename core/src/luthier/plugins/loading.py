"""Loading of plugins: the entry points of all distributions, and the records that a plugin's hooks return."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any, Final

import attrs
import pluggy

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins import hookspecs
from luthier.plugins.hookspecs import HOOKS
from luthier.plugins.records import RECORDS, Record

GROUP: Final = "luthier"
BUILTIN: Final = "luthier.builtin"


@attrs.frozen(kw_only=True)
class Source:
    """The origin of a plugin: its entry point's name and module, and its distribution."""

    plugin: str
    module: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version})"


@attrs.frozen(kw_only=True)
class Failure:
    """A plugin that did not load, and the reason."""

    source: Source
    cause: str


def find_entries() -> tuple[list[tuple[Source, metadata.EntryPoint]], list[Failure]]:
    """Return every entry point of the group, the core's own first, and the distributions whose list cannot be read.

    A distribution that is installed twice on the path counts once: the first one, which Python would import.
    """
    entry_pairs: list[tuple[Source, metadata.EntryPoint]] = []
    failures: list[Failure] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        if GROUP not in (distribution.read_text("entry_points.txt") or ""):
            continue
        name, version = _identity(distribution)
        if canonical_name(name) in seen:
            continue
        try:
            entries = list(distribution.entry_points.select(group=GROUP))
        except Exception as error:
            source = Source(plugin=name, module="entry_points.txt", distribution=name, version=version)
            failures.append(Failure(source=source, cause=describe_failure(error)))
            continue
        seen |= {canonical_name(name)} if entries else set()
        entry_pairs += [(Source(plugin=e.name, module=e.value, distribution=name, version=version), e) for e in entries]
    return sorted(entry_pairs, key=lambda f: (f[0].module != BUILTIN, f[0].plugin, f[0].distribution)), failures


def records_of(plugin: object, name: str) -> list[Record]:
    """Return all records of a plugin's hooks. Raises `plugin-invalid` with the hook at fault."""
    _refuse_misspelt(plugin)
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name)
    manager.check_pending()
    records = [record for kind in HOOKS for record in _answers(manager, kind)]
    keys = [(record.kind, record.name) for record in records]
    for kind, part in keys:
        if keys.count((kind, part)) > 1:
            raise LuthierError("plugin-invalid", f"offers {kind} {part!r} twice")
    return records


def canonical_name(name: str) -> str:
    """Return a distribution's or plugin's name in the form in which names are compared: lower case, with hyphens."""
    return name.strip().lower().replace("_", "-").replace(".", "-")


def describe_failure(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _identity(distribution: metadata.Distribution) -> tuple[str, str]:
    """Return name and version.

    Damaged metadata gives placeholders, so that it does not hide the other distributions.
    """
    try:
        return distribution.metadata["Name"] or "unknown", distribution.metadata["Version"] or ""
    except Exception:
        return "unknown", ""


def _refuse_misspelt(plugin: object) -> None:
    """Raise `plugin-invalid` for a hook that is misspelt or not marked, because pluggy would silently ignore it."""
    hooks = set(HOOKS.values())
    marked = {name for name in dir(plugin) if hasattr(getattr(plugin, name, None), f"{GROUP}_impl")}
    named = {name for name in dir(plugin) if name.startswith(f"{GROUP}_") and callable(getattr(plugin, name, None))}
    for name in sorted((marked | named) - hooks):
        raise LuthierError("plugin-invalid", f"there is no hook {name}", remedy=suggest_nearest(name, hooks))
    for name in sorted(named - marked):
        raise LuthierError("plugin-invalid", f"{name} is not marked", remedy="Mark it with @luthier.hookimpl.")
    if not marked:
        remedy = f"Offer parts by a function such as {HOOKS['adapter']}, marked with @luthier.hookimpl."
        raise LuthierError("plugin-invalid", "has no hook", remedy=remedy)


def _answers(manager: pluggy.PluginManager, kind: str) -> Iterator[Record]:
    hook: Any = getattr(manager.hook, HOOKS[kind])
    answers = hook()
    if hook.get_hookimpls() and not answers:
        raise LuthierError("plugin-invalid", f"{HOOKS[kind]} returns nothing", remedy="Return a list of records.")
    for answer in answers:
        for record in answer:
            if not isinstance(record, RECORDS[kind]):
                expected = RECORDS[kind].__name__
                raise LuthierError("plugin-invalid", f"{HOOKS[kind]} returns {expected}s", found=record,
                                   remedy=f"Return a list of {expected}s.")  # fmt: skip
            yield record
