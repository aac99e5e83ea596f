"""The look of `luthier runs` on a screen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.screen.tables import draw_commands, draw_fitted, draw_section, pairs_table, plain_table
from luthier.sizes import size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from luthier.training.run import Run

STYLES = {
    "completed": "green",
    "running": "cyan",
    "stopped": "yellow",
    "killed": "red",
    "failed": "red",
    "damaged": "red",
}
# sections of a comparison
SECTIONS = {"Options": "options", "Parts": "parts", "Versions": "versions", "Machine": "environment"}
WIDEST = 60  # columns of a curve
FIRST_TO_GO = ("adapter", "loss", "model", "age", "id")  # columns of the list that a narrow screen omits, in this order
AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def draw_list(screen: Console, runs: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Draw a line for each run, and the reasons why runs are damaged."""
    from rich.text import Text

    if not runs:
        screen.print(f"There are no runs in {directory}.")
        return
    rows: list[list[str | Text]] = [
        ["id", "name", "state", "model", "adapter", ">steps", ">loss", ">eval loss", ">age"]
    ]
    for run in runs:
        state = Text(run["state"], style=STYLES.get(run["state"], ""))
        row = [run["id"] or "-", run["name"], state, run["model"] or "-", run["adapter"] or "-", _steps(run)]
        rows.append([*row, _loss(run["loss"]), _loss(run["eval_loss"]), _age(run["age"])])
    draw_fitted(screen, rows, FIRST_TO_GO)
    for run in runs:
        if run["damage"]:
            screen.print(Text(f"damaged: {run['path']}: {run['damage']}", style=STYLES["damaged"]), soft_wrap=True)


def draw_run(screen: Console, run: Mapping[str, Any], curve: list[tuple[int, float]]) -> None:
    """Draw a run in sections."""
    draw_section(screen, "Run", pairs_table(_head(run)))
    if run["changed"]:
        draw_section(screen, "Settings that are not defaults", _values(run["changed"]))
    if run["parts"]:
        draw_section(screen, "Parts", _parts(run["parts"]))
    if run["metrics"]:
        draw_section(screen, "Numbers", _numbers(run["metrics"]))
    if curve:
        _draw_curve(screen, run, curve)
    if run["checkpoints"]:
        draw_section(screen, "Checkpoints", _checkpoints(run["checkpoints"]))
    if run["health"]:
        draw_section(screen, "Health", _health(run["health"]))
    draw_section(screen, "Files", _files(run["files"]))


def draw_difference(screen: Console, pairs: Mapping[str, Any]) -> None:
    """Draw the differences between two runs in sections; what is equal gets one word."""
    heads = ("", f"a: {pairs['a']['name']}", f"b: {pairs['b']['name']}")
    screen.print(f"a: {pairs['a']['id']}, {pairs['a']['state']}, {pairs['a']['path']}", soft_wrap=True)
    screen.print(f"b: {pairs['b']['id']}, {pairs['b']['state']}, {pairs['b']['path']}\n", soft_wrap=True)
    for title, name in SECTIONS.items():
        rows = [(row["name"], _value(row["a"]), _value(row["b"])) for row in pairs[name]]
        draw_section(screen, title, _rows(heads, rows) if rows else "the same")
    draw_section(screen, "Rows", "the same" if pairs["data"]["same"] else _pair(pairs["data"]))
    draw_section(screen, "Numbers at the end", _both(heads, pairs["metrics"]))
    if pairs["plot"]:
        screen.print(f"plot: {pairs['plot']}", soft_wrap=True)


def draw_changes(screen: Console, plan: Mapping[str, Any]) -> None:
    """Draw what a replay changes, and its folder."""
    rows = [(row["name"], _value(row["was"]), _value(row["now"])) for row in plan["changes"]]
    draw_section(screen, "Changes", _rows(("", "was", "now"), rows) if rows else "none: the recipe is the run's")
    screen.print(f"folder: {plan['output_dir']}", soft_wrap=True)
    if plan["processes"]["was"] > 1:
        many = f"The run had {plan['processes']['was']} processes, its replay has one: numbers differ by rounding."
        screen.print(many, style="yellow")
    if not rows and not plan["recipe_hash"]["same"]:
        screen.print("The recipe's hash is another: the run was made by another version of luthier.", style="yellow")


def draw_replayed(screen: Console, replayed: Mapping[str, Any], result: Run) -> None:
    """Draw the results of a replay, and how to look closer."""
    from luthier.cli.train import draw_result

    draw_result(screen, result)
    rows = {
        "rows": "the same" if replayed["data"]["same"] else "others than the run's: the files have changed",
        "loss": f"{_loss(replayed['loss']['now'])}, where the run had {_loss(replayed['loss']['was'])}",
    }
    draw_section(screen, "Beside the run", pairs_table(rows))
    both = shlex.join([replayed["of"], str(result.output_path)])
    draw_commands(screen, "Compare", [f"luthier runs diff {both} --output both.png"])


def _head(run: Mapping[str, Any]) -> dict[str, Any]:
    state = f"{run['state']}: {run['error']}" if run["error"] and run["state"] == "failed" else run["state"]
    return {
        "id": run["id"] or None,
        "folder": run["path"],
        "state": f"damaged: {run['damage']}" if run["damage"] else state,
        "ended by": run["stop_reason"],
        "model": run["model"],
        "steps": _steps(run),
        "began": f"{run['created']}, {_age(run['age'])} ago" if run["created"] else None,
        "recipe": run["recipe_hash"],
        "rows": run["data"]["fingerprint"],
        "machine": _machine(run["environment"]),
    }


def _machine(environment: Mapping[str, Any]) -> str | None:
    threads = environment["threads"]
    named = {**environment, "threads": f"{threads} thread{'s' * (threads != 1)}" if threads else None}
    return ", ".join(str(value) for value in named.values() if value) or None


def _parts(parts: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table("", "", "", show_header=False)
    for part in parts:
        known = part.get("distribution")
        origin = f"{known} {part.get('version')}" if known else "of a program"
        table.add_row(str(part.get("kind")), str(part.get("name")), origin)
    return table


def _numbers(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    table = plain_table("", ">first", ">last", ">least", ">greatest", ">median")
    for name, values in metrics.items():
        shown = (values.get(column) for column in ("first", "last", "least", "greatest", "median"))
        table.add_row(name, *("" if value is None else _number(name, value) for value in shown))
    return table


def _draw_curve(screen: Console, run: Mapping[str, Any], curve: list[tuple[int, float]]) -> None:
    """Draw the loss with characters if the screen has them, and the path of its picture."""
    from luthier.runs.chart import draw_chart

    if (screen.encoding or "").lower().startswith("utf"):
        draw_section(screen, "Loss", "\n".join(draw_chart(curve, min(WIDEST, screen.width - 16))))
    picture = Path(run["path"]) / "loss.png"
    if picture.is_file():
        screen.print(f"drawn in {picture}\n", soft_wrap=True)


def _checkpoints(checkpoints: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table("", ">", "", show_header=False)
    for checkpoint in checkpoints:
        note = "" if checkpoint["finished"] else "not finished"
        table.add_row(checkpoint["name"], size_text(checkpoint["bytes"]), note)
    return table


def _health(health: Any) -> Any:
    """Return the warnings of the run, a line for each."""
    if not isinstance(health, Mapping):
        return str(health)
    counted = {name: health[name] for name in health if name != "remarks" and health[name]}
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in counted.items()]
    for remark in health.get("remarks") or ():
        if isinstance(remark, Mapping):
            lines.append(f"step {remark.get('step')}: {remark.get('told')}")
    return "\n".join(lines) or "nothing to tell"


def _files(files: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table("", ">", show_header=False)
    for file in files:
        table.add_row(file["name"], size_text(file["bytes"]))
    return table


def _both(heads: Sequence[str], numbers: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table(heads[0], *(f">{head}" for head in heads[1:]), ">b - a")
    for row in numbers:
        shown = (row["a"], row["b"], row["difference"])
        table.add_row(row["name"], *("-" if value is None else _number(row["name"], value) for value in shown))
    return table


def _values(values: Mapping[str, Any]) -> Table:
    return pairs_table({name: _value(value) for name, value in values.items()})


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = plain_table(*heads)
    for row in rows:
        table.add_row(*row)
    return table


def _pair(pair: Mapping[str, Any]) -> str:
    return f"others: {pair['a']} and {pair['b']}"


def _number(name: str, value: float) -> str:
    return ("-" * (value < 0) + size_text(abs(value))) if name == "peak_memory" else f"{value:,.6g}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else json.dumps(value)


def _steps(run: Mapping[str, Any]) -> str:
    return f"{run['step']:,} of {run['total_steps']:,}" if run["total_steps"] else f"{run['step']:,}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    size, unit = next(((size, unit) for size, unit in AGES if seconds >= size), (1, "s"))
    return f"{seconds / size:.0f} {unit}"
