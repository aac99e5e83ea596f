"""The registry of installed parts: which distribution offers which part, and which plugins failed to load."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any, Final

import attrs

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins import catalogue
from luthier.plugins.completion import check_whole, complete_part
from luthier.plugins.events import check_callback
from luthier.plugins.loading import GROUP, Failure, Source, canonical_name, describe_failure, find_entries, records_of
from luthier.plugins.records import RECORDS, Record, check_options

__all__ = ["BLOCK", "GROUP", "Failure", "Offer", "Plugins", "Source", "check_part", "installed_plugins"]

BLOCK: Final = "LUTHIER_DISABLE_PLUGINS"
LOCAL: Final = ("datasets", "matplotlib", "numpy", "psutil", "safetensors", "torch", "transformers")  # luthier[local]


@attrs.frozen(kw_only=True)
class Offer:
    """A record together with the distribution that offers it.

    `rivals` are other distributions' offers of the same name.
    """

    record: Record
    source: Source
    rivals: tuple[Source, ...] = ()

    def __str__(self) -> str:
        return f"{self.record.kind} {self.record.name!r} of {self.source}"


class Plugins:
    """The installed parts, looked up by kind and name. Loading them imports only light entry modules.

    `blocked` names plugins or distributions that are not loaded; None means those in LUTHIER_DISABLE_PLUGINS.
    `bringing` returns the distribution that would bring a part, given its kind and name; None if it knows of none.
    """

    def __init__(
        self,
        *,
        autoload: bool = True,
        blocked: Iterable[str] | None = None,
        bringing: Callable[[str, str], str | None] = catalogue.distribution_of,
    ) -> None:
        given = os.environ.get(BLOCK, "").split(",") if blocked is None else blocked
        self.blocked = {canonical_name(name) for name in given if name.strip()}
        self._bringing = bringing
        self.failures: list[Failure] = []
        self.skipped: list[Source] = []
        self.packages: set[str] = set()  # the packages that plugins were loaded from
        self._claims: dict[tuple[str, str], list[Offer]] = {}
        if autoload:
            entries, self.failures = find_entries()
            for source, entry in entries:
                self._load(source, entry)

    def register(self, plugin: object, source: Source) -> None:
        """Add one plugin object: all of its records, or, if one is invalid, none of them and a failure."""
        try:
            records = records_of(plugin, source.plugin)
        except (Exception, SystemExit) as error:
            self.failures.append(Failure(source=source, cause=describe_failure(error)))
            return
        self.packages.add(source.module.partition(".")[0])
        for record in records:
            self._claims.setdefault((record.kind, record.name), []).append(Offer(record=record, source=source))

    def offers(self, kind: str | None = None) -> list[Offer]:
        """Return the offers of one kind (None: all kinds), by kind and name; one for each name, with its rivals."""
        order = list(RECORDS)
        chosen = [_leading(claims) for (k, _), claims in self._claims.items() if kind in (None, k)]
        return sorted(chosen, key=lambda o: (order.index(o.record.kind), o.record.name))

    def get(self, kind: str, name: str) -> Offer:
        """Return the offer of this name.

        Raises `part-unknown` with the distribution that would bring it, or `part-ambiguous`.
        """
        claims = self._claims.get((kind, name))
        if claims is None:
            raise self._unknown(kind, name)
        if len(claims) > 1:
            owners = ", ".join(str(offer.source) for offer in claims)
            remedy = f"Uninstall all but one, or disable them with {BLOCK}."
            raise LuthierError("part-ambiguous", f"several offer {kind} {name!r}: {owners}", remedy=remedy)
        return claims[0]

    def of_options(self, options: object) -> Offer:
        """Return the offer whose options class `options` is an instance of.

        Raises `part-unknown` or `part-ambiguous`.
        """
        every = [offer for claims in self._claims.values() for offer in claims]
        owners = [o for o in every if o.record.options is type(options)]
        if not owners:  # lazy classes are imported only if no plain class fits
            lazy = [o for o in every if isinstance(o.record.options, str) and _might_hold(o.record.options, options)]
            owners = [o for o in lazy if self.options(o) is type(options)]
        if len(owners) > 1 and len({o.record.name for o in owners}) > 1:
            names = ", ".join(str(o) for o in owners)
            raise LuthierError("part-ambiguous", f"{type(options).__name__} is the options of several parts: {names}",
                               remedy="Name the part.")  # fmt: skip
        if owners:
            return self.get(owners[0].record.kind, owners[0].record.name)
        raise LuthierError("part-unknown", f"no installed part has the options {type(options).__name__}",
                           remedy=self._failed() or "Install the plugin that defines them.")  # fmt: skip

    def options(self, offer: Offer) -> type:
        """Return the options class of an offer, imported if it is lazy."""
        given = offer.record.options
        if not isinstance(given, str):
            return given
        resolved = self.resolve(offer, given)
        if not isinstance(resolved, type):
            resolved = _working(offer, "cannot give its options", lambda: resolved(offer.record.name))
        check_options(resolved, str(offer))
        return resolved

    def build(self, offer: Offer, options: object) -> Any:
        """Build the part by `attribute(options)`, and check it against the protocol of its kind."""
        kind, where = offer.record.kind, f"{offer.record.kind} {offer.record.name!r}"
        make = self.resolve(offer, offer.record.build)
        check_whole(make, kind, where)
        try:
            part = make(options)
        except ImportError as error:
            raise _missing(offer, error) from error
        return check_part(part, kind, where, offer.record)

    def resolve(self, offer: Offer, target: str) -> Any:
        """Import and return what a `"module:attribute"` of an offer's record names."""
        module, _, attribute = target.partition(":")
        return _working(offer, "cannot be imported", lambda: getattr(importlib.import_module(module), attribute))

    def _load(self, source: Source, entry: metadata.EntryPoint) -> None:
        if {canonical_name(source.plugin), canonical_name(source.distribution)} & self.blocked:
            self.skipped.append(source)
            return
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:
            self.failures.append(Failure(source=source, cause=describe_failure(error)))
            return
        self.register(plugin, source)

    def _unknown(self, kind: str, name: str) -> LuthierError:
        problem = f"no installed plugin offers {kind} {name!r}"
        brings = self._bringing(kind, name)
        broken = [f for f in self.failures if _would_bring(f.source, name, brings)]
        if broken:
            remedy = "Repair or reinstall it; `luthier plugins` shows more."
            return LuthierError("part-broken", f"{problem}; a plugin failed to load: {_causes(broken)}", remedy=remedy)
        blocked = [s for s in self.skipped if _would_bring(s, name, brings)]
        if blocked:
            return LuthierError("part-unknown", f"{problem}: {blocked[0]} is disabled", remedy=f"Change {BLOCK}.")
        if brings and canonical_name(brings) not in {canonical_name(o.source.distribution) for o in self.offers()}:
            return LuthierError("part-unknown", problem, remedy=f"Install it: pip install {brings}")
        offers = self.offers(kind)
        known = _called(name, offers) or _near(name, [o.record.name for o in offers])
        return LuthierError("part-unknown", problem, remedy=f"{known} {self._failed()}".strip() or None)

    def _failed(self) -> str:
        """Return a sentence about plugins that failed to load, for an error that one of them may have caused."""
        return f"Plugins that failed to load: {_causes(self.failures)}." if self.failures else ""


@functools.cache
def installed_plugins() -> Plugins:
    """Return the plugins of this process, loaded at the first call."""
    return Plugins()


def check_part(part: Any, kind: str, where: str, record: Record | None = None) -> Any:
    """Return the part with its protocol's defaults. Raises `part-invalid` with the required members that it lacks."""
    part = complete_part(part, kind, where, record)
    if kind == "callback":
        check_callback(part, where)
    return part


def _called(name: str, offers: Iterable[Offer]) -> str:
    """Return a hint at a part whose summary has the name as a word, as papers write it: l2sp and L2-SP are one word."""
    word = _squeeze(name)
    meant = [o.record.name for o in offers if word in map(_squeeze, o.record.summary.split())]
    return f"Did you mean {meant[0]!r}?" if word and len(meant) == 1 else ""  # a common word points at nothing


def _squeeze(word: str) -> str:
    return "".join(letter for letter in word.lower() if letter.isalnum())


def _near(name: str, names: list[str]) -> str:
    """Return the nearest names, or all names, with a family such as `peft.lora`, `peft.oft` shortened to `peft.*`."""
    near = suggest_nearest(name, names)
    families = {n if "." not in n else f"{n.partition('.')[0]}.*" for n in names}
    return near if near.startswith("Did") else suggest_nearest(name, families)


def _leading(claims: list[Offer]) -> Offer:
    return attrs.evolve(claims[0], rivals=tuple(offer.source for offer in claims[1:]))


def _would_bring(source: Source, name: str, brings: str | None) -> bool:
    """Return True if a plugin that is not loaded would offer `name`, judged by the catalogue or by its own name."""
    if brings is not None:
        return canonical_name(brings) == canonical_name(source.distribution)
    own = {canonical_name(source.plugin), canonical_name(source.distribution).removeprefix("luthier-")}
    return canonical_name(name) in own or canonical_name(name.partition(".")[0]) in own


def _causes(failures: list[Failure]) -> str:
    return "; ".join(f"{failure.source}: {failure.cause}" for failure in failures)


def _working(offer: Offer, problem: str, act: Callable[[], Any]) -> Any:
    """Return the result of calling a plugin's code. Raises an error that names the plugin if that fails."""
    try:
        return act()
    except LuthierError:
        raise
    except ImportError as error:
        raise _missing(offer, error) from error
    except Exception as error:
        raise LuthierError("part-broken", f"{problem}: {describe_failure(error)}", where=str(offer)) from error


def _missing(offer: Offer, error: ImportError) -> LuthierError:
    """Return an error for a library that is not installed, with the line that installs it, or for a broken plugin."""
    library, own = (error.name or "").partition(".")[0], offer.record.build.partition(".")[0].partition(":")[0]
    if not isinstance(error, ModuleNotFoundError) or library in ("", own, "luthier"):
        return LuthierError("part-broken", f"cannot be imported: {describe_failure(error)}", where=str(offer))
    wanted = '"luthier[local]"' if library in LOCAL else library
    return LuthierError("dependency-missing", f"needs {library}, which is not installed", where=str(offer),
                        remedy=f"Run: pip install {wanted}")  # fmt: skip


def _might_hold(lazy: str, options: object) -> bool:
    """Return True if a lazy target's package could define this object's class; other packages stay unimported."""
    return lazy.partition(":")[0].partition(".")[0] == type(options).__module__.partition(".")[0]
