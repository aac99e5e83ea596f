"""The JSON schema of a recipe's parts: a name, or a mapping of the part's name and its own options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from luthier.plugins.fields.hints import field_hints
from luthier.plugins.registry import Offer, Plugins
from luthier.recipe.editor_schema.option_schemas import WORDS, Schema, bounds_of, options_schema, value_schema
from luthier.recipe.parts import FIELDS, LISTS, OPTIONAL
from luthier.recipe.reading.aliases import ALIASES, APART, VALUES
from luthier.recipe.reading.computing_aliases import QUANTIZED
from luthier.recipe.reading.draft import default_of

LISTED: Final = ("callback", *LISTS.values())
OPEN: Final[Schema] = {"type": "object"}  # for options that only a library knows


def part_reference(kind: str) -> Schema:
    """Return the reference to the schema of a part of this kind."""
    return {"$ref": f"#/$defs/{kind}"}


def part_definitions(plugins: Plugins, *, complete: bool) -> dict[str, Schema]:
    """Return the schemas of every kind of part that a recipe names, and of every installed part's options.

    `complete` imports the libraries that define some parts' options; otherwise these parts accept any options.
    """
    definitions: dict[str, Schema] = {}
    for kind in (*FIELDS, *LISTED):
        offers = plugins.offers(kind)
        definitions[kind] = _kind_schema(kind, offers)
        for offer in offers:
            definitions[f"{kind}-{offer.record.name}"] = _part_schema(offer, plugins, complete=complete)
        if not _needs_name(kind):
            definitions[f"{kind}-unnamed"] = _unnamed_schema(kind, definitions[f"{kind}-{default_of(kind)}"])
    return definitions


def find_option(kind: str, option: str, plugins: Plugins) -> Schema:
    """Return the schema of an option as any part of a kind has it; or one for any value, if no options are known."""
    classes = [offer.record.options for offer in plugins.offers(kind)]
    fields = [(cls, field) for cls in classes if isinstance(cls, type) for field in attrs.fields(cls)
              if field.alias == option]  # fmt: skip
    schemas: list[Schema] = []
    for cls, field in fields:
        schema = value_schema(field_hints(cls)[field.name], bounds_of(field))
        schemas += [schema] if schema not in schemas else []
    return {"anyOf": schemas} if schemas else {}


def _kind_schema(kind: str, offers: Iterable[Offer]) -> Schema:
    """Return a name or a mapping, whose options are those of the named part, or else of the default part."""
    known = [offer.record.name for offer in offers]
    meanings = {name: name for name in known}
    meanings |= {name: meant for name, meant in QUANTIZED.items() if kind == "adapter" and meant in known}
    names = _names_schema(offers, meanings)
    short = {alias for alias, meant in VALUES.get((kind,), {}).items() if meant in known}
    cases = [_case(kind, name, meant) for name, meant in meanings.items()]
    if _needs_name(kind):
        unnamed: Schema = {"required": ["name"]}
    else:
        unnamed = _if({"not": {"required": ["name"]}}, _options_of(kind, "unnamed"))
    absent: list[Schema] = [{"type": "null"}] if kind in OPTIONAL else []
    mapping = {"properties": {"name": names}, "allOf": [unnamed, *cases]}
    return {
        "if": {"type": "object"},
        "then": mapping,
        "else": {"anyOf": [names, *([{"enum": sorted(short)}] if short else []), *absent]},
    }


def _needs_name(kind: str) -> bool:
    """Return True if a mapping of options needs the part's name, because the kind has no default part."""
    return kind in LISTED or kind in OPTIONAL


def _names_schema(offers: Iterable[Offer], meanings: Mapping[str, str]) -> Schema:
    summaries = {offer.record.name: offer.record.summary for offer in offers}
    named = [{"const": name, "description": summaries[meant]} for name, meant in meanings.items()]
    return {"anyOf": [*named, WORDS]}


def _case(kind: str, name: str, meant: str) -> Schema:
    return _if({"required": ["name"], "properties": {"name": {"const": name}}}, _options_of(kind, meant))


def _if(condition: Schema, consequence: Schema) -> Schema:
    return {"if": condition, "then": consequence}


def _options_of(kind: str, name: str) -> Schema:
    return {"$ref": f"#/$defs/{kind}-{name}"}


def _part_schema(offer: Offer, plugins: Plugins, *, complete: bool) -> Schema:
    kind, options = offer.record.kind, offer.record.options
    head: Schema = {"description": offer.record.summary}
    if isinstance(options, str):
        if not complete:
            return {**head, **OPEN}
        options = plugins.options(offer)
    own = {field.alias for field in attrs.fields(options)}
    extra: dict[str, Schema] = {"name": {"description": offer.record.summary}}
    if kind == "optimizer" and "betas" in own:
        extra |= {name: {"type": "number", "description": "One of betas."} for name in sorted(APART - own)}
    return {**head, **options_schema(options, extra)}


def _unnamed_schema(kind: str, default: Schema) -> Schema:
    """Return the options of the default part, and other tools' names inside the mapping, such as `optimizer.lr`."""
    dotted = {alias.partition(".")[2]: meant for alias, meant in ALIASES.items() if alias.startswith(f"{kind}.")}
    aliases = {option: {"description": f"Called {meant} here.", "deprecated": True} for option, meant in dotted.items()}
    return {**default, "properties": {**aliases, **default["properties"]}}
