"""What the schema of a torch operator says: whether it makes a tensor, is pure, or overwrites an argument."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def makes_tensor(func: Any) -> bool:
    """Return True if an operation makes one tensor from none."""
    schema = func._schema
    takes = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return not takes and [str(r.type) for r in schema.returns] == ["Tensor"]


@functools.cache
def is_pure(func: Any) -> bool:
    """Return True if an operation gives one new tensor and changes none."""
    schema = getattr(func, "_schema", None)
    if schema is None or [str(r.type) for r in schema.returns] != ["Tensor"]:
        return False
    return not any(a.alias_info for a in (*schema.arguments, *schema.returns))


@functools.cache
def written_argument(func: Any) -> tuple[int, str] | None:
    """Return place and name of the argument that an operation only overwrites and returns; None for others."""
    schema = getattr(func, "_schema", None)
    if schema is None or [str(r.type) for r in schema.returns] != ["Tensor"]:
        return None
    aliased = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info]
    if len(aliased) != 1 or not aliased[0][1].is_write or torch.Tag.inplace_view in func.tags:
        return None
    return aliased[0][0], aliased[0][1].name
