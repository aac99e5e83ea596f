"""`luthier evaluate`: metrics of trained weights over rows or tasks, beside those of other weights, and a gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.completion.commands import complete_model
from luthier.cli.screen.answers import Answer
from luthier.cli.screen.early_checks import locate_model
from luthier.cli.screen.flags import Best, Json, LogFile, LogFormat, LogLevel, Step, start_api

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from luthier.training.trained.evaluate_weights import Evaluation, Number


Run = Annotated[
    str,
    typer.Argument(
        help="A run (folder, name or id), a checkpoint's folder, an adapter's, a model's, or a hub name.",
        autocompletion=complete_model,
    ),
]
Rows = Annotated[str | None, typer.Option(help="The rows; without it, the run's validation rows.")]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="A metric besides the recipe's: NAME, or {name: NAME, ...}; repeatable."),
]
Against = Annotated[str | None, typer.Option(help="Weights to compare with, on the same rows.")]
Regression = Annotated[
    float | None,
    typer.Option(help="End with status 1 where the gate's number is worse by more than this; below 0: not better."),
]
Gate = Annotated[str, typer.Option(help="The number that --max-regression is about.")]
Resamples = Annotated[
    int, typer.Option(help="Bootstrap resamples of each interval; 0: no intervals, which is faster.", min=0)
]
Answers = Annotated[int | None, typer.Option(help="Rows that metrics over answers generate answers for.", min=1)]
NewTokens = Annotated[
    int | None, typer.Option(help="Tokens of an answer; without it, the reference's number plus 32.", min=1)
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps; without it, the run's.")]


Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", help="Tasks of a benchmark, with commas between; rows are then measured with --data only."),
]
Benchmark = Annotated[str, typer.Option(help="The benchmark that has the tasks: NAME, or {name: NAME, ...}.")]
Engine = Annotated[
    str | None,
    typer.Option(help="What answers instead of the weights, such as a server: {name: NAME, ...}. Answers alone count."),
]


def evaluate(
    path: Run, *, data: Rows = None, metrics: Metrics = None, step: Step = None, best: Best = False,
    against: Against = None, max_regression: Regression = None, gate: Gate = "eval_loss", resamples: Resamples = 1000,
    max_answers: Answers = None, max_new_tokens: NewTokens = None, device: Device = None, tasks: Tasks = None,
    benchmark: Benchmark = "lm_eval", engine: Engine = None, json: Json = False,
    log_level: LogLevel = "warning", log_format: LogFormat = "console", log_file: LogFile = None,
) -> Any:  # fmt: skip
    """Measure a run or a model on held-out rows or benchmarks."""
    from luthier.recipe.reading.overrides import parse_value

    path = locate_model(path)
    against = None if against is None else locate_model(against)
    start_api(log_level, log_format, log_file)
    from luthier.artifact_api import evaluate as evaluate_model

    evaluation = evaluate_model(
        path, data, metrics=[parse_value(text) for text in metrics or ()], step=step, best=best, against=against,
        max_regression=max_regression, gate=gate, resamples=resamples, max_answers=max_answers,
        max_new_tokens=max_new_tokens, device=device, tasks=split_names(tasks), benchmark=parse_value(benchmark),
        engine=None if engine is None else parse_value(engine),
    )  # fmt: skip
    return Answer(
        document=evaluation.to_dict(),
        view=lambda screen: draw(screen, evaluation),
        status=0 if evaluation.passed else 1,
    )


def split_names(given: list[str] | None) -> list[str]:
    """Return the names of tasks in a repeatable option, each of which may hold several with commas between."""
    return list(dict.fromkeys(name for text in given or () for part in text.split(",") if (name := part.strip())))


def draw(screen: Console, result: Evaluation) -> None:
    """Draw each metric's value and interval, those of the other weights and of the difference, and the verdict."""
    from rich.text import Text

    from luthier.cli.screen.tables import draw_section

    table = _compared_table(result) if result.against_path else _metrics_table(result)
    at = "" if result.step is None else f" after step {result.step}"
    over = f"{result.rows:,} {'row' if result.rows == 1 else 'rows'}" if result.rows else "tasks"
    by = f", answered by {result.engine}" if result.engine else ""
    draw_section(screen, f"{result.path}{at}, {over}{by}", table)
    if result.gate is not None:
        verdict, style = ("passes", "bold green") if result.gate.passed else ("fails", "bold red")
        limit = result.gate.max_regression
        allowed = f"may be worse by {limit:g}" if limit > 0 else f"must be better by {-limit:g}"
        line = f"{verdict}: {result.gate.metric} is {_change(result.gate.regression)}, and "
        screen.print(Text(line + (allowed if limit else "may not be worse"), style=style))


def _change(regression: float) -> str:
    word = "worse" if regression > 0 else "better"
    return f"{word} by {abs(regression):.4g}" if regression else "the same"


def _metrics_table(result: Evaluation) -> Table:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("", ">value", ">interval")
    for name, number in result.metrics.items():
        table.add_row(name, f"{number.value:.4f}", _interval(number))
    return table


def _compared_table(result: Evaluation) -> Table:
    """Return a table with three lines for each metric, so that it is narrow enough for any terminal."""
    from luthier.cli.screen.tables import plain_table

    table = plain_table("", "of", ">value", ">interval")
    for name, number in result.metrics.items():
        lines = {result.path: number, str(result.against_path): result.against.get(name),
                 "difference": result.differences.get(name)}  # fmt: skip
        shown = [(of, value) for of, value in lines.items() if value is not None]
        for index, (of, value) in enumerate(shown):
            table.add_row("" if index else name, of, f"{value.value:.4f}", _interval(value))
    return table


def _interval(number: Number) -> str:
    if number.low is None or number.high is None:
        return ""
    return f"{number.low:.4f} to {number.high:.4f}"
