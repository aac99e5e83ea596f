"""The short forms of a recipe: a model's name, a data path, a source's path, a part's options without its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from luthier.plugins.structure import Written
from luthier.recipe.parts import FIELDS
from luthier.recipe.reading.draft import Entry, Steps

SOURCES: Final = (("data", "train"), ("data", "validation"))
# the option that a value means if it is written instead of a mapping of options
STANDS_FOR: Final[dict[Steps, str]] = {
    ("model",): "name_or_path",
    ("teacher",): "model",
    ("teacher", "model"): "name_or_path",
    ("reference", "model"): "name_or_path",
    ("data",): "train",
    ("distributed",): "strategy",
}

OF_A_SOURCE: Final = (
    "path",
    "columns",
    "template",
    "split",
    "name",
    "revision",
    "max_rows",
    "share",
    "repeat",
    "weight",
    "subset",
)


def expand_shorthand(entry: Entry) -> list[Entry] | None:
    """Return the entries that a short form stands for; None if the entry is in full form."""
    value = opened(entry.value)
    if entry.steps == ():
        return _children(entry, value)
    if entry.steps in SOURCES:
        return _changed(entry, _sources(value, shared=entry.steps == SOURCES[1]))
    if entry.steps[-1] == "name" and len(entry.steps) == 2 and entry.steps[0] in FIELDS:
        return [attrs.evolve(entry, steps=entry.steps[:1])]
    rule = RULES.get(entry.steps)
    return rule(entry, value) if rule else None


def opened(value: Any) -> Any:
    """Return a list or mapping from the command line as plain data; other values unchanged."""
    return value.value if isinstance(value, Written) and isinstance(value.value, (list, dict)) else value


def _section(entry: Entry, value: Any) -> list[Entry] | None:
    if isinstance(value, Mapping):
        return _children(entry, value)
    return [_longer(entry)] if _is_text(value) else None


def _other_model(entry: Entry, value: Any) -> list[Entry] | None:
    """Expand a teacher or reference: its name means its model; the words of `reference` stay words."""
    if isinstance(value, Mapping):
        return _children(entry, value)
    if not isinstance(value, str) or value == "none" or entry.steps == ("reference",):
        return None
    return [_longer(entry)]


def _data(entry: Entry, value: Any) -> list[Entry] | None:
    if isinstance(value, Mapping):
        if "path" in value and "train" not in value:  # one source, written beside settings of all data
            own = {k: v for k, v in value.items() if k in OF_A_SOURCE}
            rest = {k: v for k, v in value.items() if k not in own}
            return [attrs.evolve(entry, steps=SOURCES[0], value=[own]), *_children(entry, rest)]
        return _children(entry, value)
    return [_longer(entry)] if _is_text(value) or isinstance(value, list) else None


def _part(entry: Entry, value: Any) -> list[Entry] | None:
    if not isinstance(value, Mapping):
        return None
    if value and "name" not in value and "local" not in value:
        return _children(entry, value)
    return _changed(entry, dict(value))


def _callbacks(entry: Entry, value: Any) -> list[Entry] | None:
    return _changed(entry, [value] if isinstance(value, (str, Mapping, Written)) else value)


RULES: Final[dict[Steps, Callable[[Entry, Any], list[Entry] | None]]] = {
    ("model",): _section,
    ("teacher",): _other_model,
    ("teacher", "model"): _section,
    ("reference",): _other_model,
    ("reference", "model"): _section,
    ("data",): _data,
    ("distributed",): _section,
    ("callbacks",): _callbacks,
    ("exact_callbacks",): _callbacks,
    **{(kind,): _part for kind in FIELDS},
}


def _sources(value: Any, *, shared: bool) -> Any:
    """Return sources as a list of mappings. A number as validation sources is a share."""
    if isinstance(value, Mapping) or (_is_text(value) and not (shared and _is_number(value))):
        value = [value]
    return [{"path": v} if _is_text(v) else _named(v) for v in value] if isinstance(value, (list, tuple)) else value


def _named(source: Any) -> Any:
    """Return a source with `subset`, a common word for a hub dataset's configuration, renamed to our `name`."""
    if not isinstance(source, Mapping) or "subset" not in source or "name" in source:
        return source
    return {"name" if key == "subset" else key: value for key, value in source.items()}


def _longer(entry: Entry) -> Entry:
    """Return the entry at the path of the option that it stands for."""
    return attrs.evolve(entry, steps=(*entry.steps, STANDS_FOR[entry.steps]))


def _children(entry: Entry, value: Mapping[str, Any]) -> list[Entry]:
    inner = ((str(key), child) for key, child in value.items())
    return [attrs.evolve(entry, steps=(*entry.steps, k), origin=(*entry.origin, k), value=v) for k, v in inner]


def _changed(entry: Entry, value: Any) -> list[Entry] | None:
    """Return the entry with another value; None if the value is the same, which ends the expansion."""
    # NaN does not equal itself
    same = value is entry.value or (type(value) is type(entry.value) and value == entry.value)
    return None if same else [attrs.evolve(entry, value=value)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or _is_number(value)


def _is_number(value: Any) -> bool:
    """Return True if a value on the command line looks like a number; it is text if the option is a name."""
    return isinstance(value, Written) and type(value.value) in (int, float)
