"""The parts of a recipe: what it writes becomes an installed part with its options, or an object of the caller."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.compatibility import Chosen
from luthier.plugins.fields.hints import KEY
from luthier.plugins.options import describe_options, is_default
from luthier.plugins.records import as_tags
from luthier.plugins.registry import Offer, Plugins, Source, check_part, installed_plugins
from luthier.plugins.structure import Written, bare_value, structure_value, wrong_value

if TYPE_CHECKING:
    from luthier.plugins.records import Record
    from luthier.recipe.schema import Settings

# each field holds one part; an optional one may be none. Callbacks, metrics and penalties are lists
FIELDS: Final = ("adapter", "loss", "optimizer", "quantizer", "provider", "trainer")
OPTIONAL: Final = frozenset(("trainer",))
LISTS: Final = {"metrics": "metric", "penalties": "penalty"}  # settings that are lists of parts, and their kinds


@attrs.frozen(kw_only=True)
class Part:
    """One chosen part: an installed one (`offer` and `options`), or an object of the caller (`local`)."""

    kind: str
    name: str  # the record's name, or the class path of a local object
    offer: Offer | None = None
    options: Any = None
    local: Any = None

    @property
    def record(self) -> Record | None:
        return self.offer.record if self.offer else None

    @property
    def source(self) -> Source | None:
        """Return the plugin and distribution that offer the part; None for a local object."""
        return self.offer.source if self.offer else None

    def chosen(self) -> Chosen:
        """Return the part as compatibility sees it. A local object may have `needs`, `provides` and `conflicts` too."""
        giver = self.record or self.local
        tags = {verb: as_tags(getattr(giver, verb, ()), str(self.name)) for verb in ("needs", "provides", "conflicts")}
        return Chosen(kind=self.kind, name=self.name, **tags)

    def to_plain(self) -> dict[str, Any]:
        """Return the part as plain data: `{name: ..., every option}`, or `{local: 'module.Class'}`."""
        if self.local is not None:
            return {"local": self.name}
        return {"name": self.name, **plain_options(self.options)}

    def describe(self) -> dict[str, Any]:
        """Return kind, name, distribution and version for a run's record; the last two are None for a local object."""
        source = self.source
        return {
            "kind": self.kind,
            "name": self.name,
            "distribution": source.distribution if source else None,
            "version": source.version if source else None,
        }


@attrs.frozen(kw_only=True)
class Resolved:
    """The parts of a recipe, looked up and with their options read. Nothing is built yet."""

    adapter: Part
    loss: Part
    optimizer: Part
    quantizer: Part
    provider: Part
    callbacks: tuple[Part, ...]
    metrics: tuple[Part, ...] = ()
    penalties: tuple[Part, ...] = ()
    trainer: Part | None = None  # None: Luthier's own loop
    plugins: Plugins = attrs.field(repr=False)

    def __iter__(self) -> Iterator[Part]:
        """Yield every part, the callbacks, metrics and penalties last."""
        yield from (part for kind in FIELDS if (part := getattr(self, kind)) is not None)
        yield from (*self.callbacks, *self.metrics, *self.penalties)

    def chosen(self) -> list[Chosen]:
        return [part.chosen() for part in self]

    def build(self, part: Part) -> Any:
        """Build the part and check it against its kind's protocol."""
        return self.plugins.build(part.offer, part.options) if part.offer else part.local


def resolve_parts(recipe: Settings, plugins: Plugins | None = None) -> Resolved:
    """Return the parts that a recipe names.

    Raises `LuthierError` at the option that is wrong. Imports no implementation.
    """
    known = plugins or installed_plugins()
    single = {
        kind: find_part(value, kind, kind, known)
        for kind in FIELDS
        if not is_absent(kind, value := getattr(recipe, kind))
    }
    watchers = tuple(find_part(c, "callback", f"callbacks.{i}", known) for i, c in enumerate(recipe.callbacks))
    metrics = tuple(find_part(m, "metric", f"metrics.{i}", known) for i, m in enumerate(recipe.metrics))
    penalties = tuple(find_part(p, "penalty", f"penalties.{i}", known) for i, p in enumerate(recipe.penalties))
    check_repeated(penalties)
    return Resolved(**single, callbacks=watchers, metrics=metrics, penalties=penalties, plugins=known)


def check_repeated(penalties: Sequence[Part]) -> None:
    """Raise `recipe-conflict` for a penalty that is written twice. With other options it is another penalty."""
    for index, part in enumerate(penalties):
        if part.offer and any(part.name == other.name and part.options == other.options for other in penalties[:index]):
            problem, remedy = "the same penalty with the same options is written before", "Raise its weight instead."
            raise LuthierError("recipe-conflict", problem, where=f"penalties.{index}", found=part.name, remedy=remedy)


def is_absent(kind: str, value: Any) -> bool:
    """Return True if a recipe's field holds no part, and may hold none."""
    named = value.get("name", value) if isinstance(value, Mapping) else value
    return kind in OPTIONAL and bare_value(named) is None


def named_parts(parts: Iterable[Part]) -> dict[str, Part]:
    """Return parts of a list under names that differ: the second of one name is `name-2`."""
    parts_by_name: dict[str, Part] = {}
    for part in parts:
        name, number = part.name, 2
        while name in parts_by_name:
            name, number = f"{part.name}-{number}", number + 1
        parts_by_name[name] = part
    return parts_by_name


def find_part(value: Any, kind: str, where: str, plugins: Plugins) -> Part:
    """Return the part that a name, a mapping, an options object, or an object that follows the protocol stands for."""
    value = value.value if isinstance(value, Written) else value
    if isinstance(value, str):
        return _named({"name": value}, kind, where, plugins)
    if isinstance(value, Mapping):
        return _named(value, kind, where, plugins)
    if value is None or isinstance(value, (bool, int, float, list, tuple)):
        raise wrong_value(value, f"{_article(kind)}: a name, or {{name: ..., options}}").at(where)
    return _object(value, kind, where, plugins)


def to_plain(value: Any, kind: str, where: str, plugins: Plugins) -> dict[str, Any]:
    """Return what a part field holds as plain data; see `Part.to_plain`."""
    return find_part(value, kind, where, plugins).to_plain()


def plain_entry(value: Any, kind: str, where: str, plugins: Plugins) -> Any:
    """Return an entry of a list of parts as plain data; a name or a mapping stays as it was written."""
    is_written = isinstance(value, (str, Mapping))
    return plain_value(value) if is_written else to_plain(value, kind, where, plugins)


def plain_options(options: Any) -> dict[str, Any]:
    return {f.alias: plain_value(getattr(options, f.name)) for f in attrs.fields(type(options)) if f.init}


def default_options(cls: type) -> dict[str, Any]:
    """Return the defaults of an options class as plain data, without the required options."""
    return {d.name: plain_value(d.default) for d in describe_options(cls) if not d.required}


def plain_value(value: Any) -> Any:
    """Return a structured value as plain data that JSON can hold."""
    from enum import Enum
    from pathlib import Path

    if isinstance(value, Mapping):
        return {plain_value(k): plain_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain_value(v) for v in value), key=repr)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    return plain_options(value) if attrs.has(type(value)) else value


def part_identity(value: Any, kind: str, plugins: Plugins) -> Any:
    """Return a value that is equal for part fields that mean the same part: its options, or else its name."""
    try:
        part = find_part(value, kind, kind, plugins)
    except LuthierError:
        return value  # a part that is not installed is equal only to itself
    if part.local is not None:
        return part.local
    return part.name if is_default(part.options) else (part.name, part.options)


def class_path(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _named(value: Mapping[str, Any], kind: str, where: str, plugins: Plugins) -> Part:
    if "local" in value and "name" not in value:
        problem = f"this {kind} was an object in Python, {value['local']}, and cannot be loaded from a file"
        remedy = "Pass the object again in Python, or publish it as a plugin and name that."
        raise LuthierError("part-unknown", problem, where=where, remedy=remedy)
    if "name" not in value:
        raise LuthierError(
            "recipe-missing", f"the {kind} is not named", where=f"{where}.name", found=bare_value(dict(value))
        )
    name = structure_value(value["name"], str, f"{where}.name")
    try:
        offer = plugins.get(kind, name)
        cls = plugins.options(offer)
    except LuthierError as error:
        raise error.at(where) from error.__cause__
    rest = {k: v for k, v in value.items() if k != "name"}
    try:
        return Part(kind=kind, name=name, offer=offer, options=structure_value(rest, cls, where))
    except LuthierError as error:
        if error.code != "recipe-unknown-option":
            raise
        remedy = _owners((error.where or "").removeprefix(f"{where}."), offer, plugins) or error.remedy
        problem = f"{kind} {name!r} has no such option"
        raise LuthierError(error.code, problem, where=error.where, remedy=remedy) from None


def _owners(option: str, offer: Offer, plugins: Plugins) -> str:
    """Return a sentence with the parts of its kind that have an option, if the chosen part has none like it."""
    own = [f.name for f in attrs.fields(plugins.options(offer))]
    if suggest_nearest(option, own).startswith("Did"):
        return ""
    others = [(o.record.name, o.record.options) for o in plugins.offers(offer.record.kind)]
    if any(name == option for name, _ in others):
        return f"Write {{name: {option}, ...}}, with its options beside the name."
    names = [
        name
        for name, options in others
        if not isinstance(options, str) and attrs.has(options) and option in attrs.fields_dict(options)
    ]
    return f"Name the {offer.record.kind} that is meant: {' or '.join(names)}." if names else ""


def _object(value: Any, kind: str, where: str, plugins: Plugins) -> Part:
    if isinstance(value, type):
        remedy = f"Write {value.__name__}()."
        raise LuthierError("part-invalid", "this is a class, not an object", where=where, found=value, remedy=remedy)
    try:
        offer = plugins.of_options(value)
    except LuthierError as error:
        if error.code != "part-unknown" or _is_options(value):
            raise error.at(where) from None
        return Part(kind=kind, name=class_path(value), local=check_part(value, kind, f"{where}: {class_path(value)}"))
    if offer.record.kind != kind:
        problem = f"{type(value).__name__} is for {offer.record.kind} {offer.record.name!r}, not for {_article(kind)}"
        raise LuthierError("part-invalid", problem, where=where, remedy=f"Pass it as {offer.record.kind}=.")
    return Part(kind=kind, name=offer.record.name, offer=offer, options=value)


def _is_options(value: object) -> bool:
    """Return True if an object's class consists of `option()` fields, so that the object cannot be a part itself."""
    cls = type(value)
    return attrs.has(cls) and any(KEY in field.metadata for field in attrs.fields(cls))


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
