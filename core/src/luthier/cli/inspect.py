"""`luthier inspect`: examples as the loss sees them, what was dropped, and how long the rows are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import Json, LogFile, LogFormat, LogLevel, start_api
from luthier.cli.screen.recipe_arguments import Help, Sets, read_reading, show_help

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from luthier.data.inspect_examples import Inspection, Shown
    from luthier.data.report import Report

USAGE: Final = """Usage: luthier inspect [RECIPE] [OPTIONS]

  Show examples as the loss would see them. Supervised tokens are green, or
  between « and » where there is no colour. Takes what `luthier train` takes.

    luthier inspect recipe.yaml --rows 5"""
BAR: Final = 40  # characters of the histogram's longest bar


def inspect(
    context: typer.Context,
    *,
    rows: Annotated[int, typer.Option(help="Examples to show.", min=0)] = 3,
    sets: Sets = None,
    json: Json = False,
    log_level: LogLevel = "warning",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
    help_: Help = False,
) -> Any:
    """Show examples as the loss sees them, drops and lengths."""
    if help_:
        show_help(context, USAGE)
    inspection = start_api(log_level, log_format, log_file).inspect_reading(read_reading(context, sets), rows=rows)
    return Answer(document=inspection.to_dict(), view=lambda screen: draw_inspection(screen, inspection))


def draw_inspection(screen: Console, inspection: Inspection) -> None:
    """Draw the examples, then the training set's report, then the validation set's."""
    from rich.text import Text

    from luthier.cli.screen.tables import draw_section

    for number, example in enumerate(inspection.examples, 1):
        count = f"{example.supervised_tokens} of {example.tokens} tokens supervised"
        count += f", {example.shared_tokens} saved by sharing the prompt" if example.shared_tokens else ""
        count += f", weight {example.weight:g}" if example.weight != 1.0 else ""
        screen.print(Text.assemble((f"Example {number}", "bold underline"), f"  {example.where}  {count}"))
        screen.print(_example(example, coloured=screen.color_system is not None and not screen.no_color), end="\n\n")
    _draw_report(screen, "Training rows", inspection.report)
    if inspection.report.histogram:
        draw_section(screen, "Examples by length in tokens", _histogram(inspection.report.histogram))
    if inspection.report.validation is not None:
        _draw_report(screen, "Validation rows", inspection.report.validation)


def _example(example: Shown, *, coloured: bool) -> Text:
    """Return each document of the unit with supervised text coloured; several documents get names and lengths."""
    from rich.text import Text

    text = Text()
    for document in example.documents:
        if len(example.documents) > 1 and document.name:
            count = f"{document.supervised_tokens} of {document.tokens} tokens"
            text.append(f"{document.name}", style="bold").append(f"  {count}\n")
        colour = "red" if document.name == "rejected" else "green"
        for piece, supervised in document.pieces:
            marks = ("«", "»") if supervised and not coloured else ("", "")
            text.append(f"{marks[0]}{piece}{marks[1]}", style=colour if supervised else "dim")
        if document is not example.documents[-1]:
            text.append("\n" if document.name else "")
    for name, value in example.columns.items():
        text.append(f"\n{name}: ", style="bold").append(str(value))
    return text


def _draw_report(screen: Console, title: str, report: Report) -> None:
    from luthier.cli.screen.tables import draw_section, pairs_table

    lengths = _lengths(report.lengths)
    rows = {
        "format": report.format,
        "rows": f"{report.rows:,}, which make {report.examples:,} examples",
        "sources": _sources(report) or None,
        "dropped": _counted(report.drops) or "none",
        "changed": _counted(report.changes) or None,
        "tokens": f"{report.tokens:,}, {report.supervised_share:.1%} of them supervised",
        "lengths": lengths or None,
        **{f"lengths of {name}": _lengths(own) for name, own in report.document_lengths.items()},
        "shared prompts": f"save {report.shared_tokens:,} tokens" if report.shared_tokens else None,
    }
    draw_section(screen, title, pairs_table(rows))
    for warning in report.warnings:
        screen.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _sources(report: Report) -> str:
    """Return each of several sources with the number of its rows that come in an epoch."""
    lines = (
        f"{s['path']} {s['epoch_rows']:,} of {s['rows']:,} ({s['share']:.1%} of an epoch{_weighed(s['weight'])})"
        for s in report.sources
    )
    return ", ".join(lines)


def _weighed(weight: float) -> str:
    return "" if weight == 1.0 else f", weight {weight:g}"


def _histogram(bars: list[tuple[int, int, int]]) -> Table:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("", ">", "", show_header=False)
    most = max(count for *_, count in bars)
    for shortest, longest, count in bars:
        table.add_row(f"{shortest} to {longest}", f"{count:,}", "█" * -(-count * BAR // most))
    return table


def _lengths(percentiles: Mapping[str, int]) -> str:
    return ", ".join(f"{_percentile(name)} {value}" for name, value in percentiles.items())


def _percentile(name: str) -> str:
    return {"p0": "shortest", "p50": "median", "p100": "longest"}.get(name, f"{name[1:]} %")


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
