"""`luthier plugins`: the installed parts, what each accepts, and whether all of them are sound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.completion.commands import complete_kind, complete_part_name
from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import Json

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.cli.screen.part_listing import Row
    from luthier.plugins.options import Described
    from luthier.plugins.records import Record
    from luthier.plugins.registry import Offer

STYLES = {"ok": "green", "conflict": "red", "broken": "red", "blocked": "yellow", "unsupported": "yellow"}
HEADS = ("kind", "name", "distribution", "version", "state")
ROOM = 30  # the fewest characters for a summary beside its part

app = typer.Typer(help="List the installed parts; show one; check all.")


@app.callback(invoke_without_command=True)
def plugins(
    context: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if any plugin fails or conflicts.")] = False,
    json: Json = False,
) -> Any:
    """List the installed parts: kind, name, distribution, version, summary and state."""
    if context.invoked_subcommand is not None:
        return None
    from luthier.cli.screen import part_listing as listing
    from luthier.plugins.registry import installed_plugins

    rows = listing.checked_rows() if check else listing.list_parts(installed_plugins())
    failing = [row for row in rows if row.fails]
    document = {"plugins": [row.to_dict() for row in rows], "failures": [row.to_dict() for row in failing]}
    if check:
        return Answer(document=document, view=lambda screen: _draw_check(screen, rows), status=1 if failing else 0)
    return Answer(document=document, view=lambda screen: _draw_rows(screen, rows))


@app.command()
def show(
    kind: Annotated[
        str,
        typer.Argument(
            help="The kind of part: adapter, loss, ..., as the list shows it.", autocompletion=complete_kind
        ),
    ],
    name: Annotated[str, typer.Argument(help="The part's name.", autocompletion=complete_part_name)],
    json: Json = False,
) -> Any:
    """Show one part: its options, and what it needs and refuses."""
    from luthier.cli.screen.options_table import to_dict
    from luthier.errors import LuthierError, suggest_nearest
    from luthier.plugins.options import describe_options
    from luthier.plugins.records import KINDS
    from luthier.plugins.registry import installed_plugins

    if kind not in KINDS:
        raise LuthierError("part-unknown", f"there is no kind {kind!r} of part", remedy=suggest_nearest(kind, KINDS))
    registry = installed_plugins()
    offer = registry.get(kind, name)
    described = describe_options(registry.options(offer))
    document = _head(offer) | {"declares": declared_values(offer.record)}
    document |= {"options": [to_dict(option) for option in described]}
    return Answer(document=document, view=lambda screen: draw_part(screen, offer, described))


def draw_part(screen: Console, offer: Offer, described: Sequence[Described], *, flags: str = "") -> None:
    """Draw a part with its options, which are named as flags if `flags` is their prefix."""
    from rich.text import Text

    from luthier.cli.screen.options_table import options_table

    record, source = offer.record, offer.source
    screen.print(Text.assemble((f"{record.kind} {record.name}", "bold"), f": {record.summary}"))
    screen.print(Text(f"offered by {source.distribution} {source.version} ({source.module})", style="dim"))
    for verb in ("needs", "provides", "conflicts"):
        tags = sorted(getattr(record, verb))
        if tags:
            screen.print(Text(f"{verb}: {', '.join(tags)}"))
    declared = declared_values(record)
    if declared:
        screen.print(Text(f"declares: {', '.join(f'{name}: {value}' for name, value in declared.items())}"))
    table = options_table(described, flags, flags=bool(flags)) if described else "It has no options."
    screen.print()
    screen.print(table, end="\n" if described else "\n\n")


def declared_values(record: Record) -> dict[str, Any]:
    """Return what a record says beyond the fields of every record, such as `bits`, `trains` and `mergeable`."""
    import attrs

    from luthier.plugins.records import Record as Common

    common = attrs.fields_dict(Common)
    values = {name: getattr(record, name) for name in attrs.fields_dict(type(record)) if name not in common}
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _head(offer: Offer) -> dict[str, Any]:
    record, source = offer.record, offer.source
    return {
        "kind": record.kind,
        "name": record.name,
        "summary": record.summary,
        "distribution": source.distribution,
        "version": source.version,
        "module": source.module,
        "needs": sorted(record.needs),
        "provides": sorted(record.provides),
        "conflicts": sorted(record.conflicts),
    }


def _draw_rows(screen: Console, rows: Sequence[Row]) -> None:
    """Draw a line for each row, with the summary after it if there is room, else below it."""
    from rich.text import Text

    cells = [HEADS, *((row.kind or "-", row.name, row.distribution, row.version, row.state) for row in rows)]
    widths = [max(len(line[column]) for line in cells) + 2 for column in range(len(HEADS))]
    beside = screen.width - sum(widths) >= ROOM
    for line, summary in zip(cells, ["summary", *(row.summary for row in rows)], strict=True):
        *front, state = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        style = "bold" if line is HEADS else STYLES[line[-1]]
        text = Text.assemble(*front, (state, style), summary if beside else "")
        below = [] if beside or not summary else [Text(" " * widths[0] + summary, style="dim")]
        for part in (text, *below):
            part.rstrip()
            part.truncate(screen.width, overflow="ellipsis")
            screen.print(part)
    _draw_reasons(screen, [row for row in rows if row.reason])


def _draw_check(screen: Console, rows: Sequence[Row]) -> None:
    failing = [row for row in rows if row.fails]
    _draw_reasons(screen, failing)
    distributions = {row.distribution for row in rows}
    count = f"{len(failing)} of {len(rows)} fail" if failing else f"all {len(rows)} are sound"
    screen.print(f"{len(rows)} parts of {len(distributions)} distributions: {count}.")


def _draw_reasons(screen: Console, rows: Sequence[Row]) -> None:
    from rich.text import Text

    for row in rows:
        screen.print(Text(f"{row.state}: {row}: {row.reason}", style=STYLES[row.state]))
