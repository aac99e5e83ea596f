"""Nulls that a container added: Arrow fills objects of unlike keys, so that each has the keys of all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

Clean = Callable[[Any], Any]


def make_cleaner(rows: Iterable[Any]) -> Clean:
    """What takes the nulls that a container of rows added out of one of its rows; a list of dicts adds none.

    A Dataset adds them where its features name the keys of an object, a data frame where it was read from Arrow.
    """
    module = type(rows).__module__.partition(".")[0]
    if module == "datasets":
        return _of_features(getattr(rows, "features", None))
    return {"pyarrow": clean_row, "polars": clean_row, "pandas": _clean_frame_row}.get(module, _as_it_is)


def clean_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row of an Arrow table without the null keys of the objects inside of its columns."""
    return {name: remove_nulls(value) for name, value in row.items()}


def remove_nulls(value: Any) -> Any:
    """The value, each object in it without the keys that are null; a null in a list stays."""
    if isinstance(value, dict):
        return {key: remove_nulls(held) for key, held in value.items() if held is not None}
    if isinstance(value, (list, tuple)):
        return [remove_nulls(held) for held in value]
    if getattr(getattr(value, "dtype", None), "kind", None) == "O":  # an array of objects
        return remove_nulls(value.tolist())
    return value


def _of_features(features: Any) -> Clean:
    """A cleaner for rows with the features of the library datasets; those of the type Json keep their nulls."""
    inside = {name: clean for name, feature in (features or {}).items() if (clean := _of_feature(feature))}
    return functools.partial(_clean_columns, inside) if inside else _as_it_is


def _clean_columns(inside: dict[str, Clean], row: Any) -> Any:
    return {**row, **{name: clean(row[name]) for name, clean in inside.items() if row.get(name) is not None}}


def _of_feature(feature: Any) -> Clean | None:
    """What cleans a value of a feature, None where it holds no objects."""
    if isinstance(feature, dict):
        return functools.partial(_clean_object, {key: _of_feature(held) for key, held in feature.items()})
    items = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    clean = _of_feature(items) if items is not None else None
    return functools.partial(_clean_list, clean) if clean else None


def _clean_object(keys: dict[str, Clean | None], value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    held = ((key, inner, keys.get(key)) for key, inner in value.items() if inner is not None)
    return {key: clean(inner) if clean else inner for key, inner, clean in held}


def _clean_list(clean: Clean, value: Any) -> Any:
    return [clean(held) for held in value] if isinstance(value, (list, tuple)) else value


def _clean_frame_row(row: dict[str, Any]) -> dict[str, Any]:
    """A frame that was read from Arrow has arrays for lists; one of Python's own lists and dicts was not filled."""
    return clean_row(row) if any(_has_array(value) for value in row.values()) else row


def _has_array(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_array, value.values() if isinstance(value, dict) else value))
    return getattr(value, "ndim", 0) > 0


def _as_it_is(row: Any) -> Any:
    return row
