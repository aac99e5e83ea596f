"""`luthier train --overfit-one-batch`: whether what a recipe names can learn at all, before a long run."""

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
    """The verdict; status 1 where the batch is not learnt."""
    verdict: Overfit = api.train(recipe, overfit_one_batch=steps)
    return Answer(
        document=verdict.to_dict(), view=lambda screen: draw(screen, verdict), status=0 if verdict.passed else 1
    )


def draw(screen: Console, found: Overfit) -> None:
    """The verdict, what to check, the curve, and how the gradient flows."""
    from rich.text import Text

    from luthier.cli.screen.tables import draw_section, pairs_table
    from luthier.runs.chart import draw_chart

    verdict = "learns" if found.passed else "does not learn"
    screen.print(Text(f"One batch: the model {verdict} it.", style="bold green" if found.passed else "bold red"))
    draw_section(screen, "The batch", pairs_table(_facts(found)))
    if found.causes:
        draw_section(screen, "To check", "\n".join(f"- {cause}" for cause in found.causes))
    points = [(step, loss) for step, loss in enumerate(found.losses, 1) if math.isfinite(loss)]
    if (screen.encoding or "").lower().startswith("utf") and len(points) > 1:
        draw_section(screen, "Loss", "\n".join(draw_chart(points, min(60, screen.width - 16))))
    if found.flow:
        draw_section(screen, "Gradient flow", _flow(found))


def _facts(found: Overfit) -> dict[str, Any]:
    share = found.last_loss / found.first_loss if found.first_loss else float("nan")
    return {
        "loss": f"{found.first_loss:.4f} at first, {found.last_loss:.4f} after {found.steps} steps: {share:.1%} of it; "
        f"{found.threshold:.0%} is asked for",
        "rows": f"{len(found.rows)}: {', '.join(found.rows[:3])}{', ...' * (len(found.rows) > 3)}",
        "tokens": f"{found.tokens:,}, {found.supervised_tokens:,} of them supervised",
        "rate": f"{found.learning_rate:g}, without schedule, weight decay or dropout",
        "folder": str(found.output_path),
    }


def _flow(found: Overfit) -> Any:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("", ">parameters", ">gradient", ">weight", ">update / weight")
    for layer in found.flow:
        norms = (f"{layer.gradient:.3g}", f"{layer.weight:.3g}", f"{layer.ratio:.2g}")
        table.add_row(layer.layer, f"{layer.parameters:,}", *norms)
    return table
