"""The few shapes of table that the commands draw: without lines, and with a first column that is never wrapped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from luthier.artifacts.serving import Serving

GAP: Final = 2  # spaces between columns


def plain_table(*columns: str, **settings: Any) -> Table:
    """Return a table without lines and with bold heads. A column whose name begins with `>` is aligned to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", **settings)
    for index, column in enumerate(columns):
        right = column.startswith(">")
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(column.removeprefix(">"), justify=justify, no_wrap=right or index == 0, overflow="fold")
    return table


def pairs_table(pairs: Mapping[str, Any]) -> Table:
    """Return a table of names in bold beside their values, without values of None."""
    table = plain_table("", "", show_header=False)
    table.columns[0].style = "bold"
    for name, value in pairs.items():
        if value is not None:
            table.add_row(name, str(value))
    return table


def draw_fitted(screen: Console, rows: Sequence[Sequence[str | Text]], first_to_go: Sequence[str]) -> None:
    """Draw a table with one line for each row, as `fitted_lines` makes them."""
    for line in fitted_lines(screen, rows, first_to_go):
        screen.print(line, soft_wrap=True)


def fitted_lines(screen: Console, rows: Sequence[Sequence[str | Text]], first_to_go: Sequence[str]) -> list[Text]:
    """Return a line for each row; heads are the first row, and `>` at a head's start aligns to the right.

    On a terminal that is too narrow whole columns are left out, in the order of `first_to_go`; then the widest one is
    cut. A pipe gets every column whole, unless COLUMNS sets the width.
    """
    from rich.text import Text

    columns = [[Text.assemble(cell) for cell in column] for column in zip(*rows, strict=True)]
    heads = [column[0].plain for column in columns]
    for column, head in zip(columns, heads, strict=True):
        column[0] = Text(head.removeprefix(">"), style="bold")
    widths = _shown_widths(screen, {head: max(cell.cell_len for cell in column)
                                    for head, column in zip(heads, columns, strict=True)}, first_to_go)  # fmt: skip
    lines = []
    for cells in zip(*columns, strict=True):
        line = Text()
        for head, cell in zip(heads, cells, strict=True):
            if head in widths:
                cell.truncate(widths[head], overflow="ellipsis")
                cell.align("right" if head.startswith(">") else "left", widths[head])
                line += cell + Text(" " * GAP)
        line.rstrip()
        lines.append(line)
    return lines


def _shown_widths(screen: Console, widths: Mapping[str, int], first_to_go: Sequence[str]) -> dict[str, int]:
    """Return the widths of the columns that are shown, by their heads."""
    shown = dict(widths)
    if not (screen.is_terminal or "COLUMNS" in os.environ):
        return shown
    for name in first_to_go:
        if sum(shown.values()) + GAP * (len(shown) - 1) > screen.width:
            shown = {head: width for head, width in shown.items() if head.removeprefix(">") != name}
    excess = sum(shown.values()) + GAP * (len(shown) - 1) - screen.width
    widest = max(shown, key=lambda head: shown[head])
    shown[widest] -= max(0, min(excess, shown[widest] - 4))
    return shown


def draw_section(screen: Console, title: str, content: Any) -> None:
    """Draw a title above its indented content."""
    from rich.padding import Padding
    from rich.text import Text

    screen.print(Text(title, style="bold underline"))
    screen.print(Padding(content, (0, 0, 1, 2), expand=False))


def draw_commands(screen: Console, title: str, commands: Sequence[str]) -> None:
    """Draw a title above commands, each on one line however long, so that it can be copied."""
    from rich.text import Text

    screen.print(Text(title, style="bold underline"))
    for command in commands:
        screen.print(Text(f"  {command}"), soft_wrap=True)


def draw_serving(screen: Console, serving: Serving) -> None:
    """Draw how other programs serve the artifact: a line for each, which can be copied."""
    from rich.text import Text

    if not serving.commands and serving.because is None:
        return
    reason = f" ({serving.because})" if serving.because else ""
    screen.print(Text.assemble(("Serve it", "bold underline"), reason), soft_wrap=True)
    for program, command in serving.commands.items():
        screen.print(Text(f"  {program + ':':<13} {command}"), soft_wrap=True)
