"""Columns and templates of a source: the data's columns that stand for ours, and texts with {fields} of a row."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any, Final

import attrs

from luthier.data.read.row import Row, faulty_row
from luthier.errors import LuthierError, suggest_nearest
from luthier.recipe.schema import Source

IGNORE: Final = "ignore"  # written instead of a column's name: the column is not read, and no warning mentions it
Templates = dict[str, list[tuple[str, str | None]]]  # our column -> each text with the field after it


def advise_columns(mapping: str, path: str = "FILE") -> str:
    """Return how a source's columns are mapped: in a recipe, and on the command line."""
    mapped = f"columns: {{{mapping}}}"
    return f"{mapped} in the recipe's source, or write --data '{{path: {path}, {mapped}}}'"


@attrs.frozen(kw_only=True)
class Mapping:
    """The mapping of a source's columns."""

    columns: dict[str, str]  # our column -> the data's column
    templates: Templates
    mapped: frozenset[str]
    used: frozenset[str]

    @classmethod
    def of(cls, source: Source) -> Mapping:
        templates = {ours: _parts(text, f"template.{ours}") for ours, text in source.template.items()}
        fields = {field for parts in templates.values() for _, field in parts if field is not None}
        used = {*source.columns.values(), *fields}
        return cls(columns=source.columns, templates=templates, mapped=mapped_columns(source), used=frozenset(used))

    def row(self, row: Row) -> Row:
        """Return the row with our columns, or a faulty row if it lacks a column that is named."""
        try:
            return self._mapped(row) if row.fault is None else row
        except LuthierError as error:
            return faulty_row(error)

    def _mapped(self, row: Row) -> Row:
        taken, ignored = set(self.columns.values()), set()
        values = {name: value for name, value in row.values.items() if name not in taken}
        for ours, theirs in self.columns.items():
            if theirs == IGNORE and IGNORE not in row.values:
                ignored |= {ours} & values.keys()
                values.pop(ours, None)
            else:
                values[ours] = _column(row, theirs)
        both = {**row.values, **values}
        for ours, parts in self.templates.items():
            values[ours] = "".join(text + ("" if field is None else _shown(both, field, row)) for text, field in parts)
        return Row(values, row.where, self.mapped, self.used, frozenset(ignored))


def mapped_columns(source: Source) -> frozenset[str]:
    """Return our columns that a source names, except those that it ignores."""
    return frozenset({ours for ours, theirs in source.columns.items() if theirs != IGNORE} | source.template.keys())


def ignored_columns(source: Source) -> frozenset[str]:
    """Return the columns that a source says are not to be read."""
    return frozenset(ours for ours, theirs in source.columns.items() if theirs == IGNORE)


def column_mapper(source: Source) -> Callable[[Row], Row]:
    """Return a function that gives a row our columns.

    A row that lacks a named column becomes faulty (`data-column`).
    """
    if not source.columns and not source.template:
        return lambda row: row
    return Mapping.of(source).row


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
    """Return the text before each field, and the field. Only plain {names} are fields; {{ and }} are braces."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise _malformed(where, str(error), template) from None
    for _, field, form, conversion in parsed:
        if field is not None and (not field or form or conversion or "[" in field or "." in field):
            raise _malformed(where, "a field must be a plain {column}, without format, index or attribute", template)
    return [(text, field) for text, field, _, _ in parsed]


def _malformed(where: str, problem: str, template: str) -> LuthierError:
    remedy = "Write plain {columns}; write {{ and }} for braces."
    return LuthierError("recipe-wrong-type", problem, where=where, found=template, remedy=remedy)
