"""The JSON schema of a whole recipe, made from the tables that the reader uses: settings, aliases, short forms."""

from __future__ import annotations

import functools
from typing import Any, Final

import attrs

from luthier.plugins.fields.hints import field_hints
from luthier.plugins.registry import Plugins, installed_plugins
from luthier.recipe.editor_schema.option_schemas import (
    SHARED,
    Schema,
    bounds_of,
    closed_object,
    enumeration,
    option_schema,
    options_schema,
    value_schema,
)
from luthier.recipe.editor_schema.part_schemas import find_option, part_definitions, part_reference
from luthier.recipe.parts import FIELDS, LISTS
from luthier.recipe.reading.aliases import ALIASES, READINGS, VALUES
from luthier.recipe.reading.callback_list import ADDED, EXACT
from luthier.recipe.reading.computing_aliases import CHOICES
from luthier.recipe.reading.draft import Steps, default_of
from luthier.recipe.reading.overrides import SECTIONS
from luthier.recipe.reading.shorthand import OF_A_SOURCE, SOURCES, STANDS_FOR
from luthier.recipe.reading.trackers import REPORT
from luthier.recipe.schema import Data, Settings, Source

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
TEXT: Final[Schema] = {"type": "string"}
MAPPING: Final[Schema] = {"if": {"type": "object"}}


def make_schema(
    plugins: Plugins | None = None, *, sequence: type | None = None, complete: bool = False
) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of recipes, with the options of every installed part.

    It accepts every recipe that the reader accepts, and unknown keys nowhere; nothing is required, because flags may
    add the rest. `sequence` is a class of further settings, whose `tasks` are recipes themselves. `complete` imports
    the libraries that define some parts' options. `plugins` None means the installed ones.
    """
    known = plugins or installed_plugins()
    properties = {field.name: _setting((field.name,), field, Settings) for field in attrs.fields(Settings)}
    properties[EXACT] = _callbacks(exact=True)
    properties[REPORT] = _trackers()
    properties |= {alias: _alias(alias, meant, known) for alias, meant in ALIASES.items() if alias not in properties}
    properties |= {alias: _reading(alias) for alias in READINGS if alias not in properties}
    if sequence is not None:
        properties |= _sequence(sequence, list(properties))
    return {
        "$schema": DIALECT,
        "title": "A recipe of Luthier",
        **closed_object(properties),
        "$defs": {**SHARED, **part_definitions(known, complete=complete)},
    }


def _setting(steps: Steps, field: attrs.Attribute[Any], cls: type) -> Schema:
    """Return the schema of the setting at a path, with every form in which a recipe may write it."""
    if steps in SOURCES:
        number = [] if steps == SOURCES[0] else [value_schema(float, bounds_of(field))]
        return option_schema(field, {"anyOf": [*number, *_sources()]})
    if steps == (ADDED,):
        return option_schema(field, _callbacks(exact=False))
    if len(steps) == 1 and field.name in LISTS:
        return option_schema(field, {"type": "array", "items": part_reference(LISTS[field.name])})
    hint = field_hints(cls)[field.name]
    if field.name in FIELDS and hint is Any:
        return option_schema(field, part_reference(field.name))
    value = value_schema(hint, bounds_of(field), functools.partial(_section, steps))
    if steps in VALUES:
        value = {"anyOf": [value, {"enum": sorted(VALUES[steps])}]}
    if STANDS_FOR.get(steps) == "model":  # another model may be given by its name alone
        value = {"anyOf": [*value["anyOf"], TEXT]}
    return option_schema(field, value)


def _section(steps: Steps, cls: type) -> Schema:
    """Return the schema of a section: a mapping of its options, or the value that stands for one of them."""
    options = {field.name: _setting((*steps, field.name), field, cls) for field in attrs.fields(cls)}
    short = STANDS_FOR.get(steps)
    if cls is Data:
        return {**MAPPING, "then": _data(options), "else": {"anyOf": _sources(mapping=False)}}
    if short in options and short != "model":
        return {**MAPPING, "then": closed_object(options), "else": options[short]}
    return closed_object(options)


def _data(options: dict[str, Schema]) -> Schema:
    """Return the schema of data.

    A mapping with a path and without `train` is one source, with settings of all data in it.
    """
    mixed = {**_source()["properties"], **options}
    one_source: Schema = {"required": ["path"], "not": {"required": ["train"]}}
    return {"if": one_source, "then": closed_object(mixed), "else": closed_object(options)}


def _source() -> Schema:
    known = options_schema(Source)["properties"]
    return closed_object({name: known.get(name, {**TEXT, "description": "Called name here."}) for name in OF_A_SOURCE})


def _sources(*, mapping: bool = True) -> list[Schema]:
    """Return the forms of a list of sources: a path, a source's mapping, or a list of both."""
    single = [TEXT, _source()]
    return [*(single if mapping else [TEXT]), {"type": "array", "items": {"anyOf": single}}]


def _callbacks(*, exact: bool) -> Schema:
    """Return the schema of callbacks: one, a list, or `none`. Unless `exact`, `-NAME` removes one of the defaults."""
    words = ["none"] if exact else ["none", *(f"-{name}" for name in default_of(ADDED))]
    entry = {"anyOf": [part_reference("callback"), {"enum": words}]}
    listed = {"anyOf": [entry, {"type": "array", "items": entry}]}
    return {"description": "The whole list of callbacks; it adds to no default.", **listed} if exact else listed


def _trackers() -> Schema:
    """The names of callbacks that `report_to` adds."""
    one_or_more = {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": TEXT}]}
    return {"description": "Trackers, as transformers names them: callbacks that are added.", **one_or_more}


def _alias(alias: str, meant: str, plugins: Plugins) -> Schema:
    """Return the schema of another tool's name for an option: it accepts what the option accepts."""
    head: Schema = {"description": f"Called {meant} here.", "deprecated": True}
    section, _, option = meant.partition(".")
    if not option:
        return {**head, "$ref": f"#/properties/{meant}"}
    if section in SECTIONS:
        field = attrs.fields_dict(SECTIONS[section])[option]
        return {**_setting((section, option), field, SECTIONS[section]), **head}
    return {**find_option(section, option, plugins), **head}


def _reading(alias: str) -> Schema:
    """Return the schema of another tool's name whose value is written differently here.

    Most values only the reader checks.
    """
    head: Schema = {"description": "Another tool's option, which is written otherwise here.", "deprecated": True}
    return {**head, **enumeration([*CHOICES[alias], None])} if alias in CHOICES else head


def _sequence(cls: type, settings: list[str]) -> dict[str, Schema]:
    """Return the settings of several tasks. Each task is a name, data, and settings of a recipe."""
    own: dict[str, Schema] = options_schema(cls)["properties"]
    inner = {name: {"$ref": f"#/properties/{name}"} for name in settings if name != "output_dir"}
    task = {
        **closed_object({"name": {**TEXT, "description": "The task's name."}, **inner}),
        "required": ["name", "data"],
    }
    return {name: {**schema, "items": task} if name == "tasks" else schema for name, schema in own.items()}
