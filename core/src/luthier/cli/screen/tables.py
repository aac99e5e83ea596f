"""The few shapes of table that the commands draw: without lines, their first column never wrapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def plain_table(*columns: str, **settings: Any) -> Table:
    """A table without lines, its heads bold; a column whose name begins with `>` is aligned to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", **settings)
    for index, column in enumerate(columns):
        right = column.startswith(">")
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(column.removeprefix(">"), justify=justify, no_wrap=right or index == 0, overflow="fold")
    return table


def pairs_table(pairs: Mapping[str, Any]) -> Table:
    """Names in bold beside their values; what is None is left out."""
    table = plain_table("", "", show_header=False)
    table.columns[0].style = "bold"
    for name, value in pairs.items():
        if value is not None:
            table.add_row(name, str(value))
    return table


def draw_section(screen: Console, title: str, content: Any) -> None:
    """A title above its content, which is indented."""
    from rich.padding import Padding
    from rich.text import Text

    screen.print(Text(title, style="bold underline"))
    screen.print(Padding(content, (0, 0, 1, 2), expand=False))


def draw_commands(screen: Console, title: str, commands: Sequence[str]) -> None:
    """A title above commands, each on one line however long, so that it can be copied."""
    from rich.text import Text

    screen.print(Text(title, style="bold underline"))
    for command in commands:
        screen.print(Text(f"  {command}"), soft_wrap=True)
