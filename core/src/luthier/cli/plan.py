"""`luthier plan`: what a run would be, without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import typer

from luthier.cli.answers import Answer
from luthier.cli.flags import Json, LogFile, LogFormat, LogLevel, started
from luthier.cli.recipes import Help, Sets, read_recipe, show_help
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from luthier.recipe import Recipe

USAGE: Final = """Usage: luthier plan [RECIPE] [OPTIONS]

  Load, check and count everything that a run would be, and train nothing.
  Takes what `luthier train` takes.

    luthier plan recipe.yaml --max-tokens-per-device 8192"""


def plan(
    context: typer.Context,
    *,
    sets: Sets = None,
    json: Json = False,
    log_level: LogLevel = "warning",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
    help_: Help = False,
) -> Any:
    """Show what a run would be, without training."""
    if help_:
        show_help(context, USAGE)
    return planned(read_recipe(context.args, sets), log_level, log_format, log_file)


def planned(recipe: Recipe, level: Any, form: Any, file: Path | None) -> Answer:
    """The plan of a recipe; where torch is not installed, its parts alone."""
    from luthier.recipe import resolve
    from luthier.recipe.soundness import check_parts, explain

    resolved, device = resolve(recipe), recipe.device.partition(":")[0]
    check_parts(recipe, resolved, device)
    document: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "parts": [part.describe() for part in resolved],
        "compatibility": explain(recipe, resolved, device),
    }
    try:
        document |= started(level, form, file).plan(recipe).to_dict()
    except LuthierError as error:
        if error.code != "dependency-missing":
            raise
        document["not_planned"] = {"problem": error.problem, "remedy": error.remedy}
    return Answer(document=document, view=lambda screen: draw_plan(screen, document))


def draw_plan(screen: Console, found: Mapping[str, Any]) -> None:
    """The plan in sections; without the libraries of local training, its parts and what to install."""
    from luthier.cli.tables import draw_section

    draw_section(screen, "Run", _run(found["recipe"]))
    draw_section(screen, "Parts", _parts(found))
    if "not_planned" in found:
        screen.print("Parameters, memory and steps: {problem}. {remedy}".format(**found["not_planned"]), style="yellow")
        return
    draw_section(screen, "Parameters", _parameters(found["parameters"]))
    if "unreached" in found["coverage"]:
        draw_section(screen, "Weights of the base that no adapter reaches", _unreached(found["coverage"]))
    draw_section(screen, "Memory", _memory(found["memory"]))
    draw_section(screen, "Steps", _steps(found["schedule"], found["packing"]))
    for warning in found["data"]["warnings"]:
        screen.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _run(recipe: Mapping[str, Any]) -> Table:
    from luthier.cli.tables import pairs_table

    rows = {
        "model": f"{recipe['model']['name_or_path']}, {recipe['model']['dtype']}",
        "data": ", ".join(source["path"] for source in recipe["data"]["train"]),
        "folder": recipe["output_dir"] or "a new one in runs/",
    }
    return pairs_table(rows)


def _parts(found: Mapping[str, Any]) -> Table:
    """Each part with its distribution, what it needs and from whom, and what it provides."""
    from luthier.cli.tables import plain_table

    table = plain_table("", "", "", "", show_header=False)
    for part, tags in zip(found["parts"], found["compatibility"], strict=True):
        origin = f"{part['distribution']} {part['version']}" if part["distribution"] else "of this program"
        needs = [f"needs {tag} from {giver}" for tag, giver in tags["needs"].items()]
        provides = [f"provides {', '.join(tags['provides'])}"] if tags["provides"] else []
        conflicts = [f"not with {', '.join(tags['conflicts'])}"] if tags["conflicts"] else []
        table.add_row(part["kind"], part["name"], origin, "; ".join([*needs, *provides, *conflicts]))
    table.add_row("compatible", "yes", "", "every need is met, and nothing conflicts")
    return table


def _parameters(counts: Mapping[str, Mapping[str, int]]) -> Table:
    from luthier.cli.tables import plain_table

    table = plain_table("module", ">total", ">trainable", ">share")
    for kind, count in counts.items():
        share = count["trainable"] / count["total"] if count["total"] else 0.0
        table.add_row(kind, f"{count['total']:,}", f"{count['trainable']:,}", f"{share:.2%}")
    return table


def _unreached(coverage: Mapping[str, Any]) -> Table:
    from luthier.cli.tables import plain_table

    table = plain_table("", ">", "", show_header=False)
    for kind, share in coverage["unreached"].items():
        table.add_row(kind, f"{share:.1%}")
    table.add_row("all", f"{1 - coverage['reached_share']:.1%}")
    table.add_row("reached", f"{coverage['reached_share']:.1%}", f"by {len(coverage['matched'])} adapted layers")
    return table


def _memory(causes: Mapping[str, int]) -> Table:
    from luthier.cli.tables import plain_table

    table = plain_table("", ">", show_header=False)
    for cause, size in causes.items():
        table.add_row(cause, _size(size))
    return table


def _steps(schedule: Mapping[str, float], packing: Mapping[str, float]) -> Table:
    from luthier.cli.tables import pairs_table

    tokens = f"{schedule['tokens_per_epoch']:,}, {schedule['supervised_tokens_per_epoch']:,} of them supervised"
    rows = {
        "examples": f"{schedule['examples']:,}, and {schedule['validation_examples']:,} for validation",
        "tokens per epoch": tokens,
        "steps per epoch": f"{schedule['steps_per_epoch']:,}",
        "steps": f"{schedule['total_steps']:,}, which is {schedule['epochs']:.2f} epochs",
        "learning rate": f"{schedule['peak_learning_rate']:g} at its peak",
        "micro-batches": f"{packing['micro_batches_per_step']:.1f} per step, each of "
        f"{packing['documents_per_micro_batch']:.1f} documents and at most {packing['largest_micro_batch']:,} tokens",
        "packing": f"{packing['efficiency']:.1%} full",
    }
    return pairs_table(rows)


def _size(count: float) -> str:
    """Bytes with a unit: `1.4 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    raise AssertionError("every count has a unit")
