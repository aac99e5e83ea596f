"""Columns and templates of a source: which of the data's columns stand for ours, and texts with {fields} of a row."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any

from luthier.data.read.row import Row
from luthier.errors import LuthierError, suggest_nearest
from luthier.recipe.schema import Source


def column_mapper(source: Source) -> Callable[[Row], Row]:
    """A function that gives a row our columns; `data-column` where the data lacks one that is named."""
    if not source.columns and not source.template:
        return lambda row: row
    templates = {ours: _parts(text, f"template.{ours}") for ours, text in source.template.items()}
    return lambda row: _mapped(row, source.columns, templates)


def _mapped(row: Row, columns: dict[str, str], templates: dict[str, list[tuple[str, str | None]]]) -> Row:
    used = set(columns.values())
    values = {name: value for name, value in row.values.items() if name not in used}
    for ours, theirs in columns.items():
        values[ours] = _column(row, theirs)
    both = {**row.values, **values}
    for ours, parts in templates.items():
        values[ours] = "".join(text + ("" if field is None else _shown(both, field, row)) for text, field in parts)
    return Row(values, row.where)


def _column(row: Row, name: str) -> Any:
    if name in row.values:
        return row.values[name]
    raise _absent(name, row)


def _absent(name: str, row: Row) -> LuthierError:
    present = sorted(row.values)
    hint = suggest_nearest(name, present)
    listed = "" if hint.startswith("Known") else f" Present: {', '.join(present)}."
    return LuthierError("data-column", f"there is no column {name!r}", where=row.where, remedy=hint + listed)


def _shown(values: dict[str, Any], field: str, row: Row) -> str:
    if field not in values:
        raise _absent(field, row)
    value = values[field]
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def _parts(template: str, where: str) -> list[tuple[str, str | None]]:
    """The text before each field, and the field; only plain {names} are fields, {{ and }} are braces."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise _malformed(where, str(error), template) from None
    for _, field, form, conversion in parsed:
        if field is not None and (not field or form or conversion or "[" in field or "." in field):
            raise _malformed(where, "a field is a plain {column}, without format, index or attribute", template)
    return [(text, field) for text, field, _, _ in parsed]


def _malformed(where: str, problem: str, template: str) -> LuthierError:
    remedy = "Write plain {columns}; write {{ and }} for braces."
    return LuthierError("recipe-wrong-type", problem, where=where, found=template, remedy=remedy)
