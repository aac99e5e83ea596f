"""`luthier continual`: tasks trained one after another in one adapter, with a report of what was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import AllowChanged, Json, LogFile, LogFormat, LogLevel, start_api
from luthier.cli.screen.launch_ranks import answer_once
from luthier.cli.screen.recipe_arguments import Help, Sets, own_flags, show_help, split_words
from luthier.sizes import size_text

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.training.continual.forgetting_report import TaskReport
    from luthier.training.continual.sequence_plan import SequencePlan, TaskPlan

USAGE: Final = """Usage: luthier continual [RECIPE] [OPTIONS]

  Train the tasks of a recipe one after the other, or one data set cut into
  runs, and report how well each task is known after each. The same command
  goes on where it was cut off.

    luthier continual recipe.yaml
    luthier continual recipe.yaml --dry-run
    luthier continual --model demo --data rows.jsonl --num-runs 5 --adapter lora"""

NumRuns = Annotated[int | None, typer.Option(help="Cut the data into so many runs.", min=1)]
StepsPerRun = Annotated[int | None, typer.Option(help="Optimizer steps of each run.", min=1)]
SamplesPerRun = Annotated[int | None, typer.Option(help="Rows of each run.", min=1)]
MergeMode = Annotated[str | None, typer.Option(help="The adapter that merges the runs, such as slao; as --adapter.")]
EvalBase = Annotated[
    bool, typer.Option(help="Evaluate every task before the first is trained, which forward transfer needs.")
]
RateDecay = Annotated[float | None, typer.Option(help="Factor of the learning rate from each task to the next.")]
ReplayShare = Annotated[
    float | None, typer.Option(help="Examples of earlier tasks in a later one, as a share of its own.")
]
OutputDir = Annotated[Path | None, typer.Option(help="The folder of the whole run.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only check every task, and show what it would be; nothing is written.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again, in a new folder beside the existing one.")]


def continual(
    context: typer.Context, *, sets: Sets = None, num_runs: NumRuns = None, steps_per_run: StepsPerRun = None,
    samples_per_run: SamplesPerRun = None, merge_mode: MergeMode = None,
    learning_rate_decay: RateDecay = None, replay_share: ReplayShare = None, eval_base: EvalBase = True,
    output_dir: OutputDir = None, fresh: Fresh = False, dry_run: DryRun = False, allow_changed: AllowChanged = "",
    help_: Help = False, json: Json = False, log_level: LogLevel = "info", log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:  # fmt: skip
    """Train tasks in sequence, and report what was forgotten."""
    from luthier.recipe import parse_flags, parse_sets

    if help_:
        show_help(context, USAGE)
    path, flags = split_words(context.args)
    flags = flags if merge_mode is None else ["--adapter", merge_mode, *flags]
    own = {"num_runs": num_runs, "steps_per_run": steps_per_run, "samples_per_run": samples_per_run,
           "learning_rate_decay": learning_rate_decay, "replay_share": replay_share}  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    given |= {} if eval_base else {"eval_base": False}
    overrides = [*parse_flags(flags, own_flags(context)), *parse_sets(sets or ())]
    start_api(log_level, log_format, log_file)
    from luthier.runs.writing.differences import read_allowed
    from luthier.training.continual.start import plan_sequence, train_sequence

    allowed = read_allowed(allow_changed)
    if dry_run:
        planned = plan_sequence(path, overrides, given, output_dir, allowed, fresh=fresh)
        return Answer(document=planned.to_dict(), view=lambda screen: draw_sequence_plan(screen, planned))
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


def draw_sequence_plan(screen: Console, planned: SequencePlan) -> None:
    """Draw what each task would be, their sums, and what to know before."""
    from luthier.cli.screen.tables import draw_fitted, draw_section, pairs_table

    base = ", and before the first" if planned.base_evaluated else ""
    rows = {"adapter": planned.method, "folder": planned.output_path, "evaluated": f"all tasks after each{base}"}
    draw_section(screen, "Sequence", pairs_table(rows))
    heads = ["task", ">rows", ">held out", ">steps", ">epochs", ">tokens", ">memory", ">time", ">disk", "state"]
    draw_fitted(screen, [heads, *map(_task_cells, planned.tasks), _total_cells(planned)], ["epochs", "held out"])
    total = planned.total
    evaluated = f"{_number(total['evaluations'])} times the rows of a task, {_number(total['evaluated_rows'])} rows"
    draw_section(screen, "", pairs_table({"evaluations": f"{evaluated}; their time is not in the table"}))
    for task in planned.tasks:
        does_not_fit = ["its memory is not free on this device"] if task.fits is False else []
        for warning in (*does_not_fit, *task.warnings):
            screen.print(f"warning: {task.name}: {warning}", style="yellow", soft_wrap=True)


def _task_cells(task: TaskPlan) -> list[str]:
    return [
        task.name, _number(task.examples), _number(task.validation_examples), _number(task.steps),
        "" if task.epochs is None else f"{task.epochs:.2f}", _number(task.tokens), size_text(task.memory["total"]),
        _time_text(task.seconds), size_text(task.disk["total"]), task.state,
    ]  # fmt: skip


def _total_cells(planned: SequencePlan) -> list[str]:
    total = planned.total
    sizes = [size_text(int(total[name] or 0)) for name in ("memory", "disk")]
    time = _time_text(total["seconds"])
    return ["all", "", "", _number(total["steps"]), "", _number(total["tokens"]), sizes[0], time, sizes[1], ""]


def _number(number: float | None) -> str:
    return "not known" if number is None else f"{number:,.0f}"


def _time_text(seconds: float | None) -> str:
    from luthier.cli.plan import duration_text

    return "not known" if seconds is None else f"about {duration_text(seconds)}"
