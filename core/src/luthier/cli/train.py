"""`luthier train`: a run from a recipe, from flags, or from both."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luthier.cli import overfit
from luthier.cli.plan import answer_plan
from luthier.cli.screen import launch_ranks as launch
from luthier.cli.screen.answers import Answer
from luthier.cli.screen.early_checks import check_chosen_parts, check_places, check_rows
from luthier.cli.screen.flags import AllowChanged, Json, LogFile, LogFormat, LogLevel, is_first_speaker, start_api
from luthier.cli.screen.recipe_arguments import Help, Sets, read_recipe, show_help

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.recipe import Recipe
    from luthier.training.run import Run

USAGE: Final = """Usage: luthier train [RECIPE] [OPTIONS]

  Train from a recipe's file, from flags, or from both; a flag wins over the
  file. The same command goes on with an unfinished run.

    luthier train recipe.yaml --learning-rate 1e-4
    luthier train --model demo --data rows.jsonl --adapter lora --adapter.r 16"""


Resume = Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again, in a new folder beside the existing one.")]
ReDecide = Annotated[
    bool, typer.Option("--re-decide", help="Choose precision, threads and the like again when a run is resumed.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only plan, as `luthier plan` does.")]


def train(
    context: typer.Context, *, sets: Sets = None,
    resume: Resume = None, fresh: Fresh = False, re_decide: ReDecide = False, allow_changed: AllowChanged = "",
    dry_run: DryRun = False, overfit_one_batch: overfit.OneBatch = False, overfit_steps: overfit.Steps = 100,
    nproc_per_node: launch.NprocPerNode = None, nnodes: launch.Nnodes = None, node_rank: launch.NodeRank = None,
    rdzv_endpoint: launch.RdzvEndpoint = None, rdzv_id: launch.RdzvId = None, max_restarts: launch.MaxRestarts = None,
    master_addr: launch.MasterAddr = None, master_port: launch.MasterPort = None, help_: Help = False,
    json: Json = False, log_level: LogLevel = "info", log_format: LogFormat = "console", log_file: LogFile = None,
) -> Any:  # fmt: skip
    """Train from a recipe, from flags, or from both."""
    from luthier.distributed.launch import Launch

    if help_:
        show_help(context, USAGE)
    recipe = _checked_recipe(context, sets)
    if dry_run:
        return answer_plan(recipe, log_level, log_format, log_file)
    if overfit_one_batch:
        return overfit.answer_overfit(recipe, overfit_steps, start_api(log_level, log_format, log_file))
    asked = Launch(
        nproc_per_node=nproc_per_node, nnodes=nnodes, node_rank=node_rank, max_restarts=max_restarts,
        rdzv_endpoint=rdzv_endpoint, rdzv_id=rdzv_id, master_addr=master_addr, master_port=master_port,
    )  # fmt: skip
    if asked.wanted(os.environ):
        return launch.run_launched(asked, context, draw_result)
    api = start_api(log_level, log_format, log_file)
    again = None if fresh or re_decide or resume or allow_changed else _finished_answer(recipe)
    return again or launch.answer_once(lambda: api.train(
        recipe, resume=resume, fresh=fresh, re_decide=re_decide, allow_changed=allow_changed), draw_result)  # fmt: skip


def _checked_recipe(context: typer.Context, sets: Sets) -> Recipe:
    """Return the recipe of a command line, with its places checked once and not in each rank."""
    recipe = read_recipe(context, sets)
    if is_first_speaker():
        check_places(recipe)
    if "RANK" not in os.environ:
        check_chosen_parts(recipe)
        check_rows(recipe)
    return recipe


def _finished_answer(recipe: Recipe) -> Answer | None:
    """Return the answer of a run that is finished already, without torch; None in a process of several.

    Raises `run-folder-other` for a folder that is another run's.
    """
    from luthier.training.finished import find_finished

    run = None if "RANK" in os.environ else find_finished(recipe)
    return None if run is None else Answer(document=run.to_dict(), view=lambda screen: draw_result(screen, run))


def draw_result(screen: Console, run: Run) -> None:
    """Draw the results of a run, and what can be done with it next."""
    from luthier.artifacts.serving import find_serving
    from luthier.cli.screen.tables import draw_commands, draw_section, draw_serving, pairs_table

    losses = run.loss_history
    seen = f"{run.steps} steps, {run.samples_seen:,} examples, {run.tokens_seen:,} tokens, {run.duration_seconds:.1f} s"
    rows = {
        "run": f"{run.output_path}  ({run.run_id})",
        "seen": seen + (f"; ended by {run.stop_reason}" if run.stop_reason else ""),
        "loss": f"{losses[0]:.4f} at first, {run.final_loss:.4f} at the end" if losses else f"{run.final_loss:.4f}",
        "eval loss": None if run.eval_loss is None else f"{run.eval_loss:.4f}",
        "best": run.best_checkpoint,
        "saved": run.artifact,
        "merged": run.merged,
    }
    draw_section(screen, "Trained", pairs_table(rows))
    folder = shlex.quote(str(run.output_path))
    draw_commands(screen, "Next", [f"luthier chat {folder} --compare", f'luthier generate {folder} "..."'])
    draw_serving(screen, find_serving(run.merged or run.artifact))
