"""`luthier continual`: tasks trained one after another in one adapter, with a report of what was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luthier.cli.screen.flags import AllowChanged, Json, LogFile, LogFormat, LogLevel, start_api
from luthier.cli.screen.launch_ranks import answer_once
from luthier.cli.screen.recipe_arguments import Help, Sets, own_flags, show_help, split_words

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.training.continual.forgetting_report import TaskReport

USAGE: Final = """Usage: luthier continual [RECIPE] [OPTIONS]

  Train the tasks of a recipe one after the other, or one data set cut into
  runs, and report how well each task is known after each. The same command
  goes on where it was cut off.

    luthier continual recipe.yaml
    luthier continual --model demo --data rows.jsonl --num-runs 5 --adapter lora"""

NumRuns = Annotated[int | None, typer.Option(help="Cut the data into so many runs.", min=1)]
StepsPerRun = Annotated[int | None, typer.Option(help="Optimizer steps of each run.", min=1)]
SamplesPerRun = Annotated[int | None, typer.Option(help="Rows of each run.", min=1)]
MergeMode = Annotated[str | None, typer.Option(help="The adapter that merges the runs, such as slao; as --adapter.")]
EvalBase = Annotated[
    bool, typer.Option(help="Evaluate every task before the first is trained, which forward transfer needs.")
]
OutputDir = Annotated[Path | None, typer.Option(help="The folder of the whole run.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again, in a new folder beside the existing one.")]


def continual(
    context: typer.Context, *, sets: Sets = None, num_runs: NumRuns = None, steps_per_run: StepsPerRun = None,
    samples_per_run: SamplesPerRun = None, merge_mode: MergeMode = None, eval_base: EvalBase = True,
    output_dir: OutputDir = None, fresh: Fresh = False, allow_changed: AllowChanged = "", help_: Help = False,
    json: Json = False, log_level: LogLevel = "info", log_format: LogFormat = "console", log_file: LogFile = None,
) -> Any:  # fmt: skip
    """Train tasks in sequence, and report what was forgotten."""
    from luthier.recipe import parse_flags, parse_sets

    if help_:
        show_help(context, USAGE)
    path, flags = split_words(context.args)
    flags = flags if merge_mode is None else ["--adapter", merge_mode, *flags]
    own = {"num_runs": num_runs, "steps_per_run": steps_per_run, "samples_per_run": samples_per_run}
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    given |= {} if eval_base else {"eval_base": False}
    overrides = [*parse_flags(flags, own_flags(context)), *parse_sets(sets or ())]
    start_api(log_level, log_format, log_file)
    from luthier.runs.writing.differences import read_allowed
    from luthier.training.continual.start import train_sequence

    allowed = read_allowed(allow_changed)
    return answer_once(lambda: train_sequence(path, overrides, given, output_dir, allowed, fresh=fresh), draw_report)


def draw_report(screen: Console, report: TaskReport) -> None:
    """Draw each metric of every task after every task, and the measures below."""
    from luthier.cli.screen.tables import draw_section, pairs_table, plain_table
    from luthier.training.continual.forgetting_report import LEGEND

    for metric, rows in report.metrics.items():
        table = plain_table("after", *report.tasks)
        base = (report.base or {}).get(metric)
        if base:
            table.add_row("(before)", *(f"{value:.4f}" for value in base))
        for name, row in zip(report.tasks, rows, strict=True):
            table.add_row(name, *(f"{value:.4f}" for value in row))
        draw_section(screen, metric, table)
        measures = {name: f"{value:.4f}" for name, value in report.shown_measures(metric).items()}
        if measures:
            draw_section(screen, "", pairs_table(measures))
    screen.print(LEGEND)
    screen.print(f"written to {report.output_path}", soft_wrap=True)
