"""The report of a continual run: JSON for programs, Markdown for people, and a heat map of who forgot what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.disk import write_json
from luthier.training.continual.transfer import Transfer, measure_transfer

REPORT: Final = "continual.json"
TABLE: Final = "continual.md"
HEAT_MAP: Final = "continual.png"
SCHEMA: Final = 1
LEGEND: Final = (
    "average: the mean over all tasks at the end. backward: the mean change of each earlier task since it was trained. "
    "forward: that of each later task before it is trained, against the base. forgetting: the mean fall of each "
    "earlier task from its best. All are in the unit of the metric above; a change is positive if the task is known "
    "better. A perplexity has none: it is the exponential of the loss, whose changes say the same."
)


@attrs.frozen(kw_only=True)
class TaskReport:
    """The measurements of a sequence of tasks.

    `metrics[name][i][j]` is the metric of task j after task i; `base[name][j]` that before the first task, or None.
    """

    output_path: Path
    tasks: list[str]
    runs: list[Path]
    metrics: dict[str, list[list[float]]]
    base: dict[str, list[float]] | None
    seconds: list[float]
    method: str

    def transfer(self, metric: str) -> Transfer:
        """Return average, backward and forward transfer and forgetting of a metric."""
        base = None if self.base is None else self.base.get(metric)
        return measure_transfer(self.metrics[metric], base, greater_is_better=is_greater_better(metric))

    def shown_measures(self, metric: str) -> dict[str, float]:
        """Return the known measures by name as people are shown them; none of a perplexity, whose mean says little."""
        if metric.endswith("perplexity"):
            return {}
        return {name: value for name, value in attrs.asdict(self.transfer(metric)).items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `--json` prints it and `continual.json` holds it."""
        plain = attrs.asdict(self, value_serializer=lambda _, __, v: str(v) if isinstance(v, Path) else v)
        measures = {name: attrs.asdict(self.transfer(name)) for name in self.metrics}
        return {"schema": SCHEMA, **plain, "transfer": measures}


def is_greater_better(metric: str) -> bool:
    """Return True unless the metric is a loss or a perplexity."""
    return not metric.endswith(("loss", "perplexity"))


def write_report(report: TaskReport) -> None:
    """Write the JSON, the table and the picture into the folder of the whole run."""
    write_json(report.output_path / REPORT, report.to_dict())
    (report.output_path / TABLE).write_text(format_table(report), "utf-8")
    draw_heat_map(report, report.output_path / HEAT_MAP)


def read_report(folder: Path) -> dict[str, Any]:
    """Return what `write_report` wrote, as plain data."""
    return json.loads((folder / REPORT).read_text("utf-8"))


def format_table(report: TaskReport) -> str:
    """Return Markdown: for each metric every task after every task, and the measures."""
    lines = [f"# {report.output_path.name}: {report.method}", ""]
    for metric, rows in report.metrics.items():
        lines += [f"## {metric}", "", _row(["after", *report.tasks]), _row(["---"] * (len(report.tasks) + 1))]
        base = (report.base or {}).get(metric)
        lines += [_row(["(before)", *_numbers(base)])] if base else []
        lines += [_row([name, *_numbers(row)]) for name, row in zip(report.tasks, rows, strict=True)]
        measures = report.shown_measures(metric)
        lines += ["", *([", ".join(f"{name} {value:.4f}" for name, value in measures.items()), ""] if measures else [])]
    return "\n".join([*lines, LEGEND, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _numbers(values: Sequence[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


def draw_heat_map(report: TaskReport, path: Path) -> None:
    """Draw each metric as a matrix, from the base downwards task after task, with the numbers in the cells."""
    from matplotlib.figure import Figure

    size = 1.6 + 0.9 * len(report.tasks)
    figure = Figure(figsize=(size * len(report.metrics) + 1, size), dpi=120, layout="constrained")
    for number, (metric, rows) in enumerate(report.metrics.items()):
        axes = figure.add_subplot(1, len(report.metrics), number + 1)
        axes.set(xlabel="task", ylabel="after task", title=metric)
        base = (report.base or {}).get(metric)
        before = [base] if base else []
        names = [*(["(before)"] if base else []), *report.tasks]
        axes.set_xticks(range(len(report.tasks)), report.tasks, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        _draw_cells(axes, [*before, *rows], metric)
    figure.savefig(path)


def _draw_cells(axes: Any, rows: Sequence[Sequence[float]], metric: str) -> None:
    greater = is_greater_better(metric)
    scale = "log" if metric.endswith("perplexity") else "linear"  # else one large number leaves the others one colour
    image = axes.imshow(rows, cmap="viridis" if greater else "viridis_r", norm=scale)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            dark = (image.norm(value) < 0.5) == greater
            text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
            axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
