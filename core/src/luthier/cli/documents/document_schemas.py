"""JSON schemas of what the verbs print with `--json`, made from the lines of `fields.txt`."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any, Final

import attrs

from luthier.errors import LuthierError, suggest_nearest

Schema = dict[str, Any]
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
FIELD: Final = re.compile(r"(\S+?)(\?)?\s*: (.+) \| (.+)")
HEADING: Final = re.compile(r"([^:]+?)(?: is ([^:]+))?: (.+)")
PLAIN: Final[dict[str, Schema]] = {
    "text": {"type": "string"},
    "whole": {"type": "integer"},
    "number": {"type": "number"},
    "truth": {"type": "boolean"},
    "open": {"type": "object"},
    "any": {},
}
OTHERS: Final = "*"  # the field that stands for all others


@attrs.frozen(kw_only=True)
class Field:
    """A field of a document. `type` is written as in `fields.txt`."""

    name: str
    type: str
    meaning: str
    optional: bool = False


@attrs.define(kw_only=True)
class Block:
    """The output of one verb, or a record in the output of several: its fields, or the records of which it is one."""

    name: str
    meaning: str
    records: tuple[str, ...] = ()
    fields: list[Field] = attrs.field(factory=list)

    @property
    def is_record(self) -> bool:
        return self.name.isupper()


@functools.cache
def read_blocks() -> dict[str, Block]:
    """Return the blocks of `fields.txt` by verb (`runs show`) and by record (`SUMMARY`)."""
    text = resources.files("luthier.cli.documents").joinpath("fields.txt").read_text("utf-8")
    blocks: dict[str, Block] = {}
    for paragraph in re.split(r"\n\s*\n", re.sub(r"^#.*\n", "", text, flags=re.M).strip()):
        heading, *lines = paragraph.splitlines()
        name, records, meaning = _matched(HEADING, heading)
        fields = [_matched(FIELD, line) for line in lines]
        blocks[name] = Block(
            name=name,
            meaning=meaning,
            records=tuple(records.split(" or ")) if records else (),
            fields=[Field(name=n, type=t, meaning=m, optional=bool(o)) for n, o, t, m in fields],
        )
    return blocks


def list_verbs() -> list[str]:
    """Return the verbs that print a document, in the order of `fields.txt`."""
    return [name for name, block in read_blocks().items() if not block.is_record]


def document_schema(verb: str) -> Schema:
    """Return the JSON schema (draft 2020-12) of a verb's output with `--json`, its error included.

    For `chat` it is the schema of one line. Raises `usage` for a verb that prints none.
    """
    blocks = read_blocks()
    if verb not in blocks or blocks[verb].is_record:
        remedy = suggest_nearest(verb, list_verbs())
        raise LuthierError("usage", f"no verb {verb!r} prints a document", where="--of", remedy=remedy)
    failure = {
        "type": "object",
        "properties": {"error": {"$ref": "#/$defs/ERROR"}},
        "required": ["error"],
        "additionalProperties": False,
    }
    definitions = {name: _block_schema(block) for name, block in blocks.items() if block.is_record}
    title = f"What `luthier {verb} --json` prints"
    return {"$schema": DIALECT, "title": title, "anyOf": [_block_schema(blocks[verb]), failure], "$defs": definitions}


def _block_schema(block: Block) -> Schema:
    if block.records:
        return {"description": block.meaning, "anyOf": [type_schema(record) for record in block.records]}
    named = [field for field in block.fields if field.name != OTHERS]
    others = [field for field in block.fields if field.name == OTHERS]
    return {
        "description": block.meaning,
        "type": "object",
        "properties": {field.name: {"description": field.meaning, **type_schema(field.type)} for field in named},
        "required": [field.name for field in named if not field.optional],
        "additionalProperties": type_schema(others[0].type) if others else False,
    }


def type_schema(written: str) -> Schema:
    """Return the schema of a type as `fields.txt` writes it."""
    if written.endswith("?"):
        return {"anyOf": [type_schema(written[:-1]), {"type": "null"}]}
    if written[0] == "[":
        return {"type": "array", "items": type_schema(written[1:-1])}
    if written[0] == "{":
        return {"type": "object", "additionalProperties": type_schema(written[1:-1])}
    return dict(PLAIN[written]) if written in PLAIN else {"$ref": f"#/$defs/{written}"}


def _matched(pattern: re.Pattern[str], line: str) -> tuple[str, ...]:
    match = pattern.fullmatch(line)
    assert match is not None, f"fields.txt: {line}"
    return match.groups(default="")
