"""`luthier demo`: the main job from beginning to end, on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import Json, LogFile, LogFormat, LogLevel, started

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.demo import DemoResult


def demo(
    *,
    folder: Annotated[Path | None, typer.Option(help="The run's folder; without it, a new one in runs/.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of order, initialisation and dropout.", min=0)] = 0,
    max_steps: Annotated[int | None, typer.Option(help="Fewer steps, for a shorter demo.", min=1)] = None,
    json: Json = False,
    log_level: LogLevel = "error",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:
    """Fine-tune the embedded model, offline, in about a minute."""
    started(log_level, log_format, log_file)
    from luthier.demo import run

    settings = {} if max_steps is None else {"max_steps": max_steps}
    result = run(folder=folder, seed=seed, quiet=json, **settings)
    return Answer(document=result.to_dict(), view=lambda screen: draw_demo(screen, result))


def draw_demo(screen: Console, result: DemoResult) -> None:
    """Loss and answer before and after, what was made, and what to try next."""
    from luthier.cli.screen.tables import draw_commands, draw_section, pairs_table

    before, after = result.eval_loss_before, result.eval_loss_after
    change = f"{(after - before) / before:+.1%} in {result.steps} steps and {result.seconds:.0f} s"
    rows = {"loss before": f"{before:.4f} on rows that are not trained on", "loss after": f"{after:.4f}, {change}"}
    answers = {"asked": result.question, "before": result.sample_before, "after": result.sample_after}
    folders = {"run": result.run, "adapter": result.adapter, "merged": result.merged}
    draw_section(screen, "What it learnt", pairs_table(rows))
    draw_section(screen, "What it answers", pairs_table(answers))
    draw_section(screen, "What it made, each reloaded and compared", pairs_table(folders))
    draw_commands(screen, "Try next", result.next)
