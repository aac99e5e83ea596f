"""`luthier plan`: what a run would be, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luthier.cli.screen.answers import Answer
from luthier.cli.screen.early_checks import check_rows
from luthier.cli.screen.flags import Json, LogFile, LogFormat, LogLevel, start_api
from luthier.cli.screen.recipe_arguments import Help, Sets, read_recipe, show_help
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from luthier.recipe import Recipe

USAGE: Final = """Usage: luthier plan [RECIPE] [OPTIONS]

  Check and count everything that a run would be, predict its memory, and train nothing.
  Of the model only the config is read. Takes what `luthier train` takes; the rows may be left out.

    luthier plan recipe.yaml --max-tokens-per-device 8192
    luthier plan --model meta-llama/Llama-3.1-8B --adapter lora"""


def plan(
    context: typer.Context,
    *,
    sets: Sets = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Also show the values that this hardware, model and data suggest.")
    ] = False,
    json: Json = False,
    log_level: LogLevel = "warning",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
    help_: Help = False,
) -> Any:
    """Show what a run would be, without training."""
    if help_:
        show_help(context, USAGE)
    from luthier.recipe.rowless import with_or_without_rows

    recipe = with_or_without_rows(
        lambda more: read_recipe(context, [*(sets or ()), *(f"{name}={value}" for name, value in more.items())])
    )
    check_rows(recipe)
    return answer_plan(recipe, log_level, log_format, log_file, suggest=suggest)


def answer_plan(recipe: Recipe, level: Any, form: Any, file: Path | None, *, suggest: bool = False) -> Answer:
    """Return the plan of a recipe; only its parts if torch is not installed."""
    from luthier.recipe import resolve_parts
    from luthier.recipe.checks.soundness import check_parts, explain_parts

    resolved, device = resolve_parts(recipe), recipe.device.partition(":")[0]
    check_parts(recipe, resolved, device)
    document: dict[str, Any] = {
        "recipe": recipe.to_dict(),
        "parts": [part.describe() for part in resolved],
        "compatibility": explain_parts(recipe, resolved, device),
    }
    if resolved.trainer is not None:
        document["not_planned"] = _checked_trainer(recipe, start_api(level, form, file))
        return Answer(document=document, view=lambda screen: draw_plan(screen, document, suggest=suggest))
    try:
        document |= start_api(level, form, file).plan(recipe).to_dict()
    except LuthierError as error:
        if error.code != "dependency-missing":
            raise
        document["not_planned"] = {"problem": error.problem, "remedy": error.remedy}
    return Answer(document=document, view=lambda screen: draw_plan(screen, document, suggest=suggest))


def _checked_trainer(recipe: Recipe, api: Any) -> dict[str, str]:
    """Return why there are no numbers, after the trainer has accepted the recipe. Raises what the trainer refuses."""
    from luthier.training.trainers.trainer_refusals import check_trainer

    trainer = check_trainer(recipe).trainer
    assert trainer is not None
    return {"problem": f"trainer {trainer.name!r} takes its own steps", "remedy": "It accepts the recipe."}


def draw_plan(screen: Console, facts: Mapping[str, Any], *, suggest: bool = False) -> None:
    """Draw the plan in sections; without the libraries of local training, its parts and what to install."""
    from luthier.cli.screen.tables import draw_section

    draw_section(screen, "Run", _run(facts["recipe"]))
    draw_section(screen, "Parts", _parts(facts))
    if "not_planned" in facts:
        screen.print("Parameters, memory and steps: {problem}. {remedy}".format(**facts["not_planned"]), style="yellow")
        return
    draw_section(screen, "Parameters", _parameters(facts["parameters"]))
    if "unreached" in facts["coverage"]:
        draw_section(screen, "Weights of the base that no adapter reaches", _unreached(facts["coverage"]))
    draw_section(screen, "Memory at the peak", _memory(facts["memory"], facts["device"]))
    if facts["packing"]:
        draw_section(screen, "Steps", _steps(facts))
    if len({group["lr_scale"] for group in facts["groups"]}) > 1:
        draw_section(screen, "Learning rates", _rates(facts["groups"], facts["schedule"]["peak_learning_rate"]))
    if facts["operations"]:
        draw_section(screen, "Operations", _operations(facts["operations"]))
    if facts["decisions"]:
        draw_section(screen, "Decisions", _decisions(facts["decisions"]))
    if suggest:
        named = {s["option"]: s for s in facts["suggestions"]}
        draw_section(screen, "Suggested for this hardware, model and data", _decisions(named))
    for warning in (*facts["notes"], *facts["data"]["warnings"]):
        screen.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def _run(recipe: Mapping[str, Any]) -> Table:
    from luthier.cli.screen.tables import pairs_table
    from luthier.recipe.rowless import NO_ROWS

    sources = ", ".join(source["path"] for source in recipe["data"]["train"])
    rows = {
        "model": f"{recipe['model']['name_or_path']}, {recipe['model']['dtype']}",
        "data": "none is given" if sources == NO_ROWS else sources,
        "folder": recipe["output_dir"] or "a new one in runs/",
    }
    return pairs_table(rows)


def _parts(report: Mapping[str, Any]) -> Table:
    """Return each part with its distribution, what it needs and from which part, and what it provides."""
    from luthier.cli.screen.tables import plain_table

    table = plain_table("", "", "", "", show_header=False)
    for part, tags in zip(report["parts"], report["compatibility"], strict=True):
        origin = f"{part['distribution']} {part['version']}" if part["distribution"] else "of this program"
        needs = [f"needs {tag} from {giver}" for tag, giver in tags["needs"].items()]
        provides = [f"provides {', '.join(tags['provides'])}"] if tags["provides"] else []
        conflicts = [f"not with {', '.join(tags['conflicts'])}"] if tags["conflicts"] else []
        table.add_row(part["kind"], part["name"], origin, "; ".join([*needs, *provides, *conflicts]))
    table.add_row("compatible", "yes", "", "every need is met, and nothing conflicts")
    return table


def _parameters(counts: Mapping[str, Mapping[str, int]]) -> Table:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("module", ">total", ">trainable", ">share")
    for kind, count in counts.items():
        share = count["trainable"] / count["total"] if count["total"] else 0.0
        table.add_row(kind, f"{count['total']:,}", f"{count['trainable']:,}", f"{share:.2%}")
    return table


def _operations(operations: Sequence[str]) -> Table:
    from luthier.cli.screen.tables import pairs_table

    rows: dict[str, str] = {}
    for line in operations:
        name, _, implementation = line.partition(": ")
        rows[name] = f"{rows[name]}, {implementation}" if name in rows else implementation
    return pairs_table(rows)


def _unreached(coverage: Mapping[str, Any]) -> Table:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("", ">", "", show_header=False)
    for kind, share in coverage["unreached"].items():
        table.add_row(kind, f"{share:.1%}")
    table.add_row("all", f"{1 - coverage['reached_share']:.1%}")
    table.add_row("reached", f"{coverage['reached_share']:.1%}", f"by {len(coverage['matched'])} adapted layers")
    return table


def _memory(causes: Mapping[str, int], device: Mapping[str, Any]) -> Table:
    """Return the bytes by cause, the free memory, and whether it is enough."""
    from luthier.cli.screen.tables import plain_table
    from luthier.sizes import size_text

    table = plain_table("", ">", "", show_header=False)
    for cause, size in causes.items():
        table.add_row(cause, size_text(size), "")
    if device["process"] is not None:
        table.add_row("process", size_text(device["process"]), "of libraries, which a system monitor counts besides")
    answer = {True: "it fits", False: "it does not fit", None: ""}[device["fits"]]
    table.add_row(f"free on {device['device']}", size_text(device["free"]), answer)
    return table


def _steps(facts: Mapping[str, Any]) -> Table:
    """Return rows, steps and micro-batches, time and disk. A stream does not know all of them beforehand."""
    from luthier.cli.screen.tables import pairs_table

    schedule, packing, time = facts["schedule"], facts["packing"], facts["time"]
    supervised, steps = schedule["supervised_tokens_per_epoch"], schedule["total_steps"]
    epochs = f", which is {schedule['epochs']:.2f} epochs" if schedule["epochs"] else ""
    rows = {
        "examples": f"{_count(schedule['examples'])}, and {schedule['validation_examples']:,} for validation",
        "tokens per epoch": f"{_count(schedule['tokens_per_epoch'])}, {_count(supervised)} of them supervised",
        "steps per epoch": _count(schedule["steps_per_epoch"]),
        "steps": f"{_count(steps)}{epochs}",
        "learning rate": f"{schedule['peak_learning_rate']:g} at its peak",
        "micro-batches": f"{packing['micro_batches_per_step']:.1f} per step, each of "
        f"{packing['documents_per_micro_batch']:.1f} documents and at most {packing['largest_micro_batch']:,} tokens",
        "packing": f"{packing['efficiency']:.1%} full",
    }
    if schedule["tokens_saved_per_epoch"]:
        rows["shared prompts"] = f"save {schedule['tokens_saved_per_epoch']:,} tokens per epoch"
    if time:
        rows["time"] = (
            f"about {duration_text(time['seconds'])}: {time['share']:.0%} ({time['share_from']}) of the rate of "
        )
        rows["time"] += f"{time['rate_from']}: {time['rate'] / 1e9:,.0f} GFLOP/s"
    rows["disk"] = f"about {_disk(facts['disk'])}"
    return pairs_table(rows)


def _disk(sizes: Mapping[str, int]) -> str:
    from luthier.sizes import size_text

    parts = [f"{size_text(size)} of {kind}" for kind, size in sizes.items() if size and kind != "total"]
    return f"{size_text(sizes['total'])}: {', '.join(parts)}"


def _count(number: int | None) -> str:
    return "not known" if number is None else f"{number:,}"


def duration_text(seconds: float) -> str:
    """Return a duration for people: seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _rates(groups: Sequence[Mapping[str, Any]], peak: float) -> Table:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("", ">at its peak", ">parameters", "")
    for group in groups:
        more = f" and {group['tensors'] - 1} more" if group["tensors"] > 1 else ""
        rate = f"{peak * group['lr_scale']:.3g}"
        table.add_row(group["role"], rate, f"{group['parameters']:,}", group["names"][0] + more)
    return table


def _value_text(value: Any) -> str:
    """A chosen value as text; the items of a list below each other."""
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _decisions(taken: Mapping[str, Mapping[str, Any]]) -> Table:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("", "", "", show_header=False)
    for name, decision in taken.items():
        table.add_row(name, _value_text(decision["value"]), decision["reason"])
    return table
