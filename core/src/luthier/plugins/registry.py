"""The registry: which parts are installed, by whom, and what failed to load."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import attrs
import pluggy

from luthier.errors import LuthierError, nearest
from luthier.plugins import catalogue, hookspecs
from luthier.plugins.hookspecs import HOOKS
from luthier.plugins.protocols import MEMBERS
from luthier.plugins.records import RECORDS, Record

GROUP = "luthier"
BLOCK = "LUTHIER_DISABLE_PLUGINS"


@attrs.frozen(kw_only=True)
class Source:
    """Where a plugin comes from: its entry point's name and module, and its distribution."""

    plugin: str
    module: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version})"


@attrs.frozen(kw_only=True)
class Offer:
    """A record with the distribution that offers it. `rivals` are others that claim the name."""

    record: Record
    source: Source
    rivals: tuple[Source, ...] = ()


@attrs.frozen(kw_only=True)
class Failure:
    source: Source
    cause: str


class Plugins:
    """All parts that are installed, looked up by kind and name. Loading imports only light entry modules."""

    def __init__(self, *, autoload: bool = True, blocked: Iterable[str] | None = None) -> None:
        given = os.environ.get(BLOCK, "").split(",") if blocked is None else blocked
        self.blocked = {name.strip() for name in given if name.strip()}
        self.failures: list[Failure] = []
        self.skipped: list[Source] = []
        self._offers: dict[tuple[str, str], Offer] = {}
        for entry in _entries() if autoload else ():
            self._load(entry)

    def register(self, plugin: object, source: Source) -> None:
        """Add one plugin object; all of its records, or none and a failure."""
        try:
            found = list(_records(plugin, source.plugin))
        except Exception as error:
            self.failures.append(Failure(source=source, cause=f"{type(error).__name__}: {error}"))
            return
        for record in found:
            key = (record.kind, record.name)
            known = self._offers.get(key)
            fresh = Offer(record=record, source=source)
            self._offers[key] = attrs.evolve(known, rivals=(*known.rivals, source)) if known else fresh

    def offers(self, kind: str | None = None) -> list[Offer]:
        """Every offer, or those of one kind, by kind and name."""
        order = list(RECORDS)
        chosen = [o for (k, _), o in self._offers.items() if kind in (None, k)]
        return sorted(chosen, key=lambda o: (order.index(o.record.kind), o.record.name))

    def get(self, kind: str, name: str) -> Offer:
        """The offer of this name, or an error that says which distribution would bring it."""
        offer = self._offers.get((kind, name))
        if offer is None:
            raise self._unknown(kind, name)
        if offer.rivals:
            claims = ", ".join(str(s) for s in (offer.source, *offer.rivals))
            raise LuthierError("part-ambiguous", f"several distributions offer {kind} {name!r}: {claims}")
        return offer

    def of_options(self, options: object) -> Offer:
        """The offer whose options class an object is an instance of."""
        for offer in self._offers.values():
            if offer.record.options is type(options):
                return offer
        for offer in self._offers.values():  # lazy classes are named only once no plain one fits
            lazy = offer.record.options
            if isinstance(lazy, str) and _might_hold(lazy, options) and self.options(offer) is type(options):
                return offer
        raise LuthierError("part-unknown", f"no installed part has the options {type(options).__name__}")

    def options(self, offer: Offer) -> type:
        """The options class of an offer, resolved if it is lazy."""
        given = offer.record.options
        if not isinstance(given, str):
            return given
        resolved = self._resolve(offer, given)
        return resolved if isinstance(resolved, type) else resolved(offer.record.name)

    def build(self, offer: Offer, options: object) -> Any:
        """The part itself: `attribute(options)`, checked against the protocol of its kind."""
        part = self._resolve(offer, offer.record.build)(options)
        return checked(part, offer.record.kind, f"{offer.record.kind} {offer.record.name!r}")

    def _resolve(self, offer: Offer, target: str) -> Any:
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except LuthierError:
            raise
        except Exception as error:
            where = f"{offer.record.kind} {offer.record.name!r} of {offer.source}"
            cause = f"cannot be imported: {type(error).__name__}: {error}"
            raise LuthierError("part-broken", cause, where=where) from error

    def _load(self, entry: metadata.EntryPoint) -> None:
        source = _source(entry)
        if {source.plugin, source.distribution} & self.blocked:
            self.skipped.append(source)
            return
        try:
            plugin = entry.load()
        except Exception as error:
            self.failures.append(Failure(source=source, cause=f"{type(error).__name__}: {error}"))
            return
        self.register(plugin, source)

    def _unknown(self, kind: str, name: str) -> LuthierError:
        known = [o.record.name for o in self.offers(kind)]
        problem = f"no installed plugin offers {kind} {name!r}"
        remedy = nearest(name, known)
        broken = [f for f in self.failures if name in f.source.plugin or name in f.source.distribution]
        if broken:
            causes = "; ".join(f"{f.source}: {f.cause}" for f in broken)
            return LuthierError("part-broken", f"{problem}; a plugin failed to load: {causes}", remedy="Repair it.")
        if any(name in (s.plugin, s.distribution.removeprefix("luthier-")) for s in self.skipped):
            return LuthierError("part-unknown", f"{problem}: its plugin is disabled", remedy=f"Change {BLOCK}.")
        brings = catalogue.distribution(kind, name)
        if brings:
            return LuthierError("part-unknown", problem, remedy=f"Install it: pip install {brings}")
        return LuthierError("part-unknown", problem, remedy=remedy)


@functools.cache
def installed() -> Plugins:
    """The plugins of this process, loaded once."""
    return Plugins()


def checked(part: Any, kind: str, where: str) -> Any:
    """The part, if it has every member of its kind's protocol; else an error that names those it lacks."""
    missing = [name for name in MEMBERS[kind] if not hasattr(part, name)]
    if missing:
        raise LuthierError("part-invalid", f"does not keep the {kind} protocol: no {', '.join(missing)}", where=where)
    return part


def _entries() -> list[metadata.EntryPoint]:
    """One entry point per name and distribution; the core's own parts come first."""
    unique = {(e.name, e.value, e.dist.name if e.dist else ""): e for e in metadata.entry_points(group=GROUP)}
    return sorted(unique.values(), key=lambda e: (e.value != "luthier.builtin", e.name))


def _source(entry: metadata.EntryPoint) -> Source:
    name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "")
    return Source(plugin=entry.name, module=entry.value, distribution=name, version=version)


def _records(plugin: object, name: str) -> Iterable[Record]:
    """What a plugin's hooks return, after pluggy has checked their names and arguments."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name)
    manager.check_pending()
    _refuse_misspelt(plugin)
    for kind, hook in HOOKS.items():
        for answer in getattr(manager.hook, hook)():
            for record in answer:
                if not isinstance(record, RECORDS[kind]):
                    raise LuthierError("plugin-invalid", f"{hook} returns {RECORDS[kind].__name__}s", found=record)
                yield record


def _refuse_misspelt(plugin: object) -> None:
    """A function named like a hook but not marked would be ignored for ever."""
    for attribute in dir(plugin):
        if attribute.startswith("luthier_") and callable(getattr(plugin, attribute)):
            marked = hasattr(getattr(plugin, attribute), "luthier_impl")
            if attribute not in HOOKS.values() or not marked:
                remedy = nearest(attribute, HOOKS.values()) + " Mark it with @luthier.hookimpl."
                raise LuthierError("plugin-invalid", f"{attribute} is not a hook implementation", remedy=remedy)


def _might_hold(lazy: str, options: object) -> bool:
    """Whether a lazy target's package could have defined this object, so that others stay unimported."""
    return lazy.split(".")[0].split(":")[0] == type(options).__module__.split(".")[0]
