"""What luthier-selective offers: the adapters `bitfit` and `modules`, described without importing torch."""

from __future__ import annotations

from pathlib import Path

import attrs
from luthier import AdapterRecord, hookimpl, option

__all__ = ["BitFit", "Modules", "luthier_adapters", "options_of"]


@attrs.frozen(kw_only=True)
class BitFit:
    """`adapter: bitfit`"""

    target_modules: str | list[str] | None = option(
        None,
        help="Modules whose biases train, by ends of their names (a list) or a regular expression for the whole name "
        "(a "
        "string); none: all biases.",
    )


@attrs.frozen(kw_only=True)
class Modules:
    """`adapter: {name: modules, target_modules: [...], norms: true, ...}`"""

    target_modules: str | list[str] | None = option(
        None,
        help="Modules that train with all their parts, by ends of their names (a list) or a regular expression for the "
        "whole "
        "name (a string).",
    )
    norms: bool | None = option(None, help="Train every norm; none: only if nothing else is chosen.")
    embeddings: bool = option(False, help="Train the input embedding and the head.")
    token_ids: list[int] | None = option(
        None, help="Train only the rows of these tokens, in the input embedding and the head.", low=0
    )


def options_of(folder: str | Path) -> Modules:
    """Return the options with which rows of tokens in this folder, ours or PEFT's, can be attached and loaded."""
    from luthier_selective.row_files import read_row_options

    return read_row_options(Path(folder))


@hookimpl
def luthier_adapters() -> list[AdapterRecord]:
    return [
        AdapterRecord(
            name="bitfit",
            summary="Only biases train (BitFit).",
            options=BitFit,
            build="luthier_selective.adapter:SelectiveAdapter",
            provides="trainable-weights",
        ),
        AdapterRecord(
            name="modules",
            summary="Only chosen modules, norms, embeddings or rows of new tokens train.",
            options=Modules,
            build="luthier_selective.adapter:SelectiveAdapter",
            provides="trainable-weights",
        ),
    ]
