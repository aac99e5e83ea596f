"""`luthier runs`: what has been trained here: the list, one run in full, two compared, and one trained again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.completion.commands import complete_run
from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import Json, LogFile, LogFormat, LogLevel, start_api
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.runs.replay import Replay
    from luthier.runs.run_folder import RunFolder
    from luthier.training.run import Run

USUAL = Path("runs")  # the folder of runs without output_dir

Name = Annotated[
    str,
    typer.Argument(help="A run's id, which may be abbreviated, its name, or its folder.", autocompletion=complete_run),
]
Dir = Annotated[Path | None, typer.Option("--dir", help="The directory that holds the runs; without it, runs.")]

app = typer.Typer(help="List the runs; show one; compare two; train one again.")


@app.callback(invoke_without_command=True)
def runs(context: typer.Context, directory: Dir = None, json: Json = False) -> Any:
    """List the runs, the newest first: id, state, model, adapter, steps, losses, age."""
    if context.invoked_subcommand is not None:
        context.obj = directory
        return None
    from luthier.cli.screen.runs_view import draw_list
    from luthier.runs.find import all_runs

    if directory is not None and not directory.is_dir():
        raise LuthierError("run-not-found", "there is no such directory", where=str(directory))
    summaries = [run.summary() for run in all_runs(directory or USUAL)]
    return Answer(document={"runs": summaries}, view=lambda screen: draw_list(screen, summaries, directory or USUAL))


@app.command()
def show(context: typer.Context, run: Name, *, directory: Dir = None, json: Json = False) -> Any:
    """Show one run: settings, parts, numbers, checkpoints, curve."""
    from luthier.cli.screen.runs_view import draw_run
    from luthier.runs.details import run_details

    folder = _found(context, run, directory)
    document = run_details(folder)
    return Answer(document=document, view=lambda screen: draw_run(screen, document, folder.survey.series("loss")))


@app.command()
def diff(
    context: typer.Context,
    a: Name,
    b: Name,
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Draw both losses to this PNG.")] = None,
    directory: Dir = None,
    json: Json = False,
) -> Any:
    """Show how two runs differ: options, parts, data, numbers."""
    from luthier.cli.screen.runs_view import draw_difference
    from luthier.runs.compare import compare_runs, draw_both

    one, other = _found(context, a, directory), _found(context, b, directory)
    document = compare_runs(one, other)
    document["plot"] = None if output is None else str(draw_both(one, other, output))
    return Answer(document=document, view=lambda screen: draw_difference(screen, document))


@app.command()
def replay(
    context: typer.Context,
    run: Name,
    *,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one option.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="The new folder; without it, one beside the run's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    directory: Dir = None,
    json: Json = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:
    """Train a run's recipe again, with options changed or as it was."""
    from luthier.cli.screen.answers import make_console
    from luthier.cli.screen.runs_view import draw_changes, draw_replayed
    from luthier.runs.replay import replay_run as prepared

    folder = _found(context, run, directory)
    plan = prepared(folder, sets or (), output_dir)
    if dry_run:
        return Answer(document=plan.to_dict(), view=lambda screen: draw_changes(screen, plan.to_dict()))
    draw_changes(make_console(stderr=True), plan.to_dict())
    result = start_api(log_level, log_format, log_file).train(plan.recipe)
    document = _replayed(folder, plan, result)
    return Answer(document=document, view=lambda screen: draw_replayed(screen, document, result))


def _found(context: typer.Context, name: str, directory: Path | None) -> RunFolder:
    """Return the run that a name means, in the directory given after the verb or before it."""
    from luthier.runs.find import find_run

    return find_run(name, directory or context.obj or USUAL)


def _replayed(run: RunFolder, plan: Replay, result: Run) -> dict[str, Any]:
    """Return the results of a replay beside those of the run."""
    from luthier.runs.run_folder import read_folder

    again = read_folder(result.output_path)
    rows = {"was": run.record.get("data"), "now": again.record.get("data")}
    losses = {"was": run.latest("loss"), "now": again.latest("loss")}
    return {
        **plan.to_dict(),
        "of": str(run.path),
        "data": {**rows, "same": rows["was"] == rows["now"]},
        "loss": losses,
        "run": result.to_dict(),
    }
