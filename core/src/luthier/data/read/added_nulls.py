"""Nulls that a container added: Arrow fills up objects with different keys, so that each has the keys of all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

Clean = Callable[[Any], Any]


def make_cleaner(rows: Iterable[Any]) -> Clean:
    """Return a function that removes the nulls which a container of rows added. A list of dicts adds none.

    A Dataset adds them if its features name the keys of an object, a data frame if it was read from Arrow.
    """
    module = type(rows).__module__.partition(".")[0]
    if module == "datasets":
        return _of_features(getattr(rows, "features", None))
    return {"pyarrow": clean_row, "polars": clean_row, "pandas": _clean_frame_row}.get(module, _as_it_is)


def clean_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of an Arrow table without the null keys of objects inside its columns."""
    return {name: remove_nulls(value) for name, value in row.items()}


def remove_nulls(value: Any) -> Any:
    """Return the value without null keys in its objects. A null in a list stays."""
    if isinstance(value, dict):
        return {key: remove_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [remove_nulls(item) for item in value]
    if getattr(getattr(value, "dtype", None), "kind", None) == "O":  # an array of objects
        return remove_nulls(value.tolist())
    return value


def _of_features(features: Any) -> Clean:
    """Return a cleaner for rows with features of the library datasets. Features of type Json keep their nulls."""
    inside = {name: clean for name, feature in (features or {}).items() if (clean := _of_feature(feature))}
    return functools.partial(_clean_columns, inside) if inside else _as_it_is


def _clean_columns(inside: dict[str, Clean], row: Any) -> Any:
    return {**row, **{name: clean(row[name]) for name, clean in inside.items() if row.get(name) is not None}}


def _of_feature(feature: Any) -> Clean | None:
    """Return what cleans a value of a feature; None if the feature holds no objects."""
    if isinstance(feature, dict):
        return functools.partial(_clean_object, {key: _of_feature(inner) for key, inner in feature.items()})
    items = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    clean = _of_feature(items) if items is not None else None
    return functools.partial(_clean_list, clean) if clean else None


def _clean_object(keys: dict[str, Clean | None], value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items = ((key, inner, keys.get(key)) for key, inner in value.items() if inner is not None)
    return {key: clean(inner) if clean else inner for key, inner, clean in items}


def _clean_list(clean: Clean, value: Any) -> Any:
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value


def _clean_frame_row(row: dict[str, Any]) -> dict[str, Any]:
    """Clean the row of a frame that was read from Arrow, which has arrays for lists; others were not filled up."""
    return clean_row(row) if any(_has_array(value) for value in row.values()) else row


def _has_array(value: Any) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_array, value.values() if isinstance(value, dict) else value))
    return getattr(value, "ndim", 0) > 0


def _as_it_is(row: Any) -> Any:
    return row
