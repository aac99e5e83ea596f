"""`luthier train --overfit-one-batch`: a test that a recipe's model can learn at all, before a long run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.screen.answers import Answer

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.recipe import Recipe
    from luthier.training.planning.overfit_batch import Overfit

OneBatch = Annotated[
    bool,
    typer.Option("--overfit-one-batch", help="Only try to learn the first batch by heart, in a folder of its own."),
]
Steps = Annotated[int, typer.Option("--overfit-steps", help="Steps of that trial.", min=1)]


def answer_overfit(recipe: Recipe, steps: int, api: Any) -> Answer:
    """Return the verdict, with status 1 if the batch is not learnt."""
    verdict: Overfit = api.train(recipe, overfit_one_batch=steps)
    return Answer(
        document=verdict.to_dict(), view=lambda screen: draw(screen, verdict), status=0 if verdict.passed else 1
    )


def draw(screen: Console, trial: Overfit) -> None:
    """Draw the verdict, what to check, the loss curve, and how the gradient flows."""
    from rich.text import Text

    from luthier.cli.screen.tables import draw_section, pairs_table
    from luthier.runs.chart import draw_chart

    verdict = "learns" if trial.passed else "does not learn"
    screen.print(Text(f"One batch: the model {verdict} it.", style="bold green" if trial.passed else "bold red"))
    draw_section(screen, "The batch", pairs_table(_facts(trial)))
    if trial.causes:
        draw_section(screen, "To check", "\n".join(f"- {cause}" for cause in trial.causes))
    points = [(step, loss) for step, loss in enumerate(trial.losses, 1) if math.isfinite(loss)]
    if (screen.encoding or "").lower().startswith("utf") and len(points) > 1:
        draw_section(screen, "Loss", "\n".join(draw_chart(points, min(60, screen.width - 16))))
    if trial.flow:
        draw_section(screen, "Gradient flow", _flow(trial))


def _facts(trial: Overfit) -> dict[str, Any]:
    share = trial.last_loss / trial.first_loss if trial.first_loss else float("nan")
    return {
        "loss": f"{trial.first_loss:.4f} at first, {trial.last_loss:.4f} after {trial.steps} steps: {share:.1%} of it; "
        f"{trial.threshold:.0%} is asked for",
        "rows": f"{len(trial.rows)}: {', '.join(trial.rows[:3])}{', ...' * (len(trial.rows) > 3)}",
        "tokens": f"{trial.tokens:,}, {trial.supervised_tokens:,} of them supervised",
        "rate": f"{trial.learning_rate:g}, without schedule, weight decay or dropout",
        "folder": str(trial.output_path),
    }


def _flow(trial: Overfit) -> Any:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("", ">parameters", ">gradient", ">weight", ">update / weight")
    for layer in trial.flow:
        norms = (f"{layer.gradient:.3g}", f"{layer.weight:.3g}", f"{layer.ratio:.2g}")
        table.add_row(layer.layer, f"{layer.parameters:,}", *norms)
    return table
