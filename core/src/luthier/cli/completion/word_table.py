"""The words that completion offers, stored in one small file, so that the tab key loads no plugin."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

import luthier
from luthier.disk import cache_folder

FILE: Final = "completion.json"
DISABLED: Final = "LUTHIER_DISABLE_PLUGINS"

Options = dict[str, dict[str, Any]]  # option -> its help and the values that it may have


def read_words() -> dict[str, Any]:
    """Return the table of words: the settings, the sections' options, and the parts of each kind with their options.

    It is made again after a package was installed or removed, or a module with parts changed.
    """
    path = cache_folder() / FILE
    with contextlib.suppress(OSError, ValueError):
        table = json.loads(path.read_text("utf-8"))
        if isinstance(table, dict) and table.get("state") == _state(table.get("modules", ())):
            return table
    words = _make_words()
    with contextlib.suppress(OSError):  # without a writable disk completion is slow, but correct
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(words), "utf-8")
    return words


def _state(modules: Iterable[str]) -> list[Any]:
    """Return what the table depends on: the folders of packages, the modules it was read from, what is disabled."""
    # the first path is the script's own folder
    places = [*(place for place in sys.path[1:] if os.path.isdir(place)), *modules]
    times = [[place, os.stat(place).st_mtime_ns if os.path.exists(place) else 0] for place in places]
    return [luthier.__version__, os.environ.get(DISABLED, ""), times]


def _make_words() -> dict[str, Any]:
    from luthier.plugins.registry import installed_plugins
    from luthier.recipe import schema
    from luthier.recipe.editor_schema.part_schemas import LISTS
    from luthier.recipe.parts import FIELDS
    from luthier.recipe.reading.aliases import QUANTIZED

    offers = installed_plugins().offers()
    modules = {offer.source.module.partition(":")[0] for offer in offers}
    modules |= {offer.record.options.__module__ for offer in offers if isinstance(offer.record.options, type)}
    loaded = [getattr(sys.modules.get(name), "__file__", None) for name in modules]
    files = sorted(str(file) for file in (*loaded, schema.__file__) if file)
    parts: dict[str, dict[str, Any]] = {}
    for offer in offers:
        options = {} if isinstance(offer.record.options, str) else _describe(offer.record.options)
        parts.setdefault(offer.record.kind, {})[offer.record.name] = {"help": offer.record.summary, "options": options}
    return {
        "modules": files,
        "state": _state(files),
        "settings": _describe(schema.Settings),
        "sections": {name: _describe(cls) for name, cls in _find_sections(schema.Settings).items()},
        "fields": [*FIELDS, "callbacks"],
        "lists": LISTS,
        "quantized": {
            name: f"{part} on weights in four bits." for name, part in QUANTIZED.items() if part in parts["adapter"]
        },
        "parts": parts,
    }


def _find_sections(settings: type) -> dict[str, type]:
    """Return the settings that have options of their own, each with the class of these options."""
    import typing

    import attrs

    from luthier.plugins.fields.hints import field_hints

    inner = {name: [cls for cls in (hint, *typing.get_args(hint)) if isinstance(cls, type) and attrs.has(cls)]
             for name, hint in field_hints(settings).items()}  # fmt: skip
    return {name: classes[0] for name, classes in inner.items() if classes}


def _describe(cls: type) -> Options:
    """Return the options of a class: help, the default of a part's field, and values if there are few."""
    import attrs

    from luthier.plugins.fields.hints import KEY, field_hints

    hints = field_hints(cls)
    return {field.alias: {"help": field.metadata[KEY].help if KEY in field.metadata else "",
                          "values": _values(hints[field.name], field.metadata.get(KEY)),
                          "default": field.default if isinstance(field.default, str) else None}
            for field in attrs.fields(cls) if field.init}  # fmt: skip


def _values(hint: Any, bounds: Any) -> list[str]:
    """Return the few values of a type: its choices, or true and false; an empty list if there are many."""
    import typing

    if bounds is not None and bounds.choices:
        return [str(choice) for choice in bounds.choices]
    if hint is bool:
        return ["true", "false"]
    if typing.get_origin(hint) is typing.Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    return [value for member in typing.get_args(hint) if typing.get_origin(hint) not in (list, dict, tuple)
            for value in _values(member, None)]  # fmt: skip


def part_names(words: Mapping[str, Any], kind: str) -> list[tuple[str, str]]:
    """Return the installed parts of a kind, each with its summary."""
    return [(name, part["help"]) for name, part in words["parts"].get(kind, {}).items()]
