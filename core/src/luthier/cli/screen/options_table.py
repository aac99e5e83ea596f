"""Options for people: a table of name, type, default, bounds and meaning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.cli.screen.tables import plain_table
from luthier.plugins.options import Described

if TYPE_CHECKING:
    from rich.table import Table

WIDEST = 16  # characters of a type beside its option's name; a longer type is put before the meaning


def to_dict(option: Described) -> dict[str, Any]:
    """Return one option as plain data for `--json`."""
    return {
        "name": option.name,
        "type": option.type,
        "default": option.default,
        "required": option.required,
        "low": option.bounds.low,
        "high": option.bounds.high,
        "choices": None if option.bounds.choices is None else list(option.bounds.choices),
        "help": option.bounds.help,
    }


def options_table(described: Sequence[Described], prefix: str = "", *, flags: bool = False) -> Table:
    """Return a table with a row for each option: name and type, then meaning, default and bounds."""
    from rich.text import Text

    table = plain_table("", "", show_header=False)
    for option in described:
        name = f"--{prefix}{option.name.replace('_', '-')}" if flags else f"{prefix}{option.name}"
        kind, long = (option.type, "") if len(option.type) <= WIDEST else ("value", option.type)
        facts = "; ".join(filter(None, (long, _default(option), _bounds(option))))
        table.add_row(
            Text.assemble((name, "bold"), (f" {kind}", "dim")),
            Text.assemble(option.bounds.help, (f" [{facts}]", "dim")),
        )
    return table


def _default(option: Described) -> str:
    """Return the default as a recipe writes it."""
    if option.required:
        return "required"
    if option.default is None:
        return "default none"
    text = option.default if isinstance(option.default, str) else json.dumps(option.default, default=str)
    return f"default {text}"


def _bounds(option: Described) -> str:
    """Return the bounds, such as `1 to 8`, `at least 1` or `one of a, b`; an empty text if there are none."""
    low, high, choices = option.bounds.low, option.bounds.high, option.bounds.choices
    if choices is not None:
        return f"one of {', '.join(str(choice) for choice in choices)}"
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    if low is not None:
        return f"at least {low:g}"
    return "" if high is None else f"at most {high:g}"
