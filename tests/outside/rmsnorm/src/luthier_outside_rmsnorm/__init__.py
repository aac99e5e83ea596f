"""An RMS norm as a Luthier operation: its record and its hook."""

from __future__ import annotations

from collections.abc import Iterable

from luthier import OperationRecord, hookimpl

__version__ = "0.1.0"


@hookimpl
def luthier_operations() -> Iterable[OperationRecord]:
    return [
        OperationRecord(
            name="outside.rms_norm",
            summary="RMS norm with a written-out backward that keeps one number for each row.",
            operation="rms_norm",
            build="luthier_outside_rmsnorm.norm:build_norm",
            predicate="luthier_outside_rmsnorm.norm:is_supported",
            priority=10,
            tolerance=1e-5,
        )
    ]
