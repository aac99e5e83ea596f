"""The look of jobs, their events and providers' offers on a screen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from luthier.cli.screen.tables import draw_commands, draw_section, fitted_lines, pairs_table, plain_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from luthier.plugins.providing.job_records import (
        Job,
        JobEvent,
        JobMetrics,
        JobProgress,
        Progress,
        TrainedArtifact,
    )

STYLES: Final = {
    "completed": "green", "running": "cyan", "pending": "cyan", "unknown": "yellow", "failed": "red",
    "canceled": "yellow",
}  # fmt: skip
FIRST_TO_GO: Final = ("service's id", "method", "age", "provider")  # columns of a terminal that is too narrow
AGES: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def draw_jobs(screen: Console, jobs: Sequence[Job], total: int) -> None:
    """Draw a line for each job, and how many more there are."""
    if not jobs:
        screen.print("There are no jobs.")
        return
    for line in job_lines(screen, jobs):
        screen.print(line, soft_wrap=True)
    if total > len(jobs):
        screen.print(f"{total - len(jobs)} more: luthier jobs --limit {total}")


def job_lines(screen: Console, jobs: Sequence[Job]) -> list[Text]:
    """Return the lines of a table of jobs, under a line of heads, as wide as the screen."""
    from rich.text import Text

    rows: list[list[str | Text]] = [["id", "provider", "state", "model", "method", ">step", ">age", "service's id"]]
    for job in jobs:
        state = Text(job.state.value, style=STYLES[job.state])
        rows.append([job.id, job.spec.provider, state, job.spec.model, job.spec.method, _steps(job),
                     age_text(time.time() - job.spec.created), job.remote_id or job.stage.value])  # fmt: skip
    return fitted_lines(screen, rows, FIRST_TO_GO)


def draw_job(screen: Console, job: Job, progress: JobProgress | None = None, metrics: JobMetrics | None = None) -> None:
    """Draw a job in full, and what can be done with it next."""
    status = job.status
    rows: dict[str, Any] = {
        "job": job.id,
        "provider": f"{job.spec.provider} ({job.spec.scope})" if job.spec.scope else job.spec.provider,
        "state": job.state.value + (f" ({job.raw_state})" if job.raw_state else ""),
        "phase": job.phase or (None if job.remote_id else job.stage.value),
        "reason": job.reason or ("its cancellation was asked for" if _is_leaving(job) else None),
        "service's id": job.remote_id,
        "model": job.spec.model,
        "result": status.result_model if status else None,
        **_numbers(progress, metrics),
    }
    draw_section(screen, "Job", pairs_table(rows))
    if job.state == "completed":
        draw_commands(screen, "Next", [f"luthier download {job.id}"])
    elif not job.is_final:
        verbs = ("attach",) if _is_leaving(job) else ("attach", "cancel")
        draw_commands(screen, "Next", [f"luthier {verb} {job.id}" for verb in verbs])


def draw_prepared(screen: Console, prepared: Mapping[str, Any]) -> None:
    """Draw what a submission would send, and where; nothing was sent."""
    rows = {
        "provider": f"{prepared['provider']} ({prepared['scope']})" if prepared["scope"] else prepared["provider"],
        "model": prepared["model"],
        "method": prepared["method"],
        **prepared["settings"],
        **{f"{file['role']} rows": f"{file['rows']:,}, {file['bytes']:,} bytes" for file in prepared["files"]},
        "result": prepared["output_dir"],
    }
    draw_section(screen, "Would be sent", pairs_table(rows))


def _is_leaving(job: Job) -> bool:
    """Return True for a job whose end was asked for and has not come."""
    return job.cancel_requested is not None and not job.is_final


def draw_submitted(screen: Console, job: Job) -> None:
    """Draw a job that has just been submitted."""
    draw_job(screen, job)


def draw_events(screen: Console, events: Sequence[JobEvent]) -> None:
    """Draw a line for each event."""
    for event in events:
        screen.print(event_line(event), soft_wrap=True)


def draw_log(screen: Console, job: Job, events: Sequence[JobEvent], fresh: Sequence[JobEvent]) -> None:
    """Draw the `fresh` ones of a job's events; where it has none at all, its state and the reason."""
    draw_events(screen, fresh)
    if not events:
        reason = f": {job.reason}" if job.reason else ""
        screen.print(f"There are no events of this job; it is {job.state.value}{reason}", soft_wrap=True)


def event_line(event: JobEvent) -> str:
    """Return an event as one line: its time, its message, its numbers."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at)) if event.at else "-"
    numbers = "  ".join(f"{k} {'nan' if v is None else f'{v:g}'}" for k, v in event.metrics.items())
    return "  ".join(
        part for part in (at, event.level if event.level != "info" else "", event.message, numbers) if part
    )


def draw_artifact(screen: Console, artifact: TrainedArtifact) -> None:
    """Draw what was downloaded."""
    rows = {"path": artifact.path, "kind": artifact.kind, "format": artifact.format, "base": artifact.base_model,
            "files": len(artifact.files)}  # fmt: skip
    draw_section(screen, "Downloaded", pairs_table(rows))


def draw_estimates(screen: Console, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw a line for each provider: price, tokens, weights, or why it refuses."""
    table = plain_table("provider", ">price", ">tokens", "weights", "because")
    for line in lines:
        price = (
            "refused"
            if line["refused"]
            else "none"  # no service charges for the job
            if line["currency"] is None
            else "unknown"
            if line["amount"] is None
            else f"{line['amount']:.2f} {line['currency']}"
        )
        tokens = "-" if line["tokens"] is None else f"{line['tokens']:,}"
        table.add_row(
            line["provider"], price, tokens, ", ".join(line["weights"]) or "hosted", line["refused"] or line["basis"]
        )
    screen.print(table)
    for line in lines:
        for finding in line["findings"]:
            place = f"{finding['where']}: " if finding["where"] else ""
            screen.print(f"{line['provider']}: {finding['level']}: {place}{finding['message']}", soft_wrap=True)


@contextmanager
def transfer_bar(screen: Console, name: str) -> Iterator[Progress | None]:
    """Yield a function that moves a bar for a transfer if the screen is a terminal; else None."""
    if not screen.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    with Progress(TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=screen) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def age_text(seconds: float) -> str:
    """Return an age in its largest unit."""
    for size, unit in AGES:
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "now"


def _steps(job: Job) -> str:
    progress = job.status.progress if job.status else None
    if progress is None or progress.step is None:
        return "-"
    return str(progress.step) if progress.total_steps is None else f"{progress.step}/{progress.total_steps}"


def _numbers(progress: JobProgress | None, metrics: JobMetrics | None) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    if progress is not None:
        step = None if progress.step is None else str(progress.step)
        rows["step"] = step if progress.total_steps is None else f"{step or 0} of {progress.total_steps}"
        rows["epoch"] = None if progress.epoch is None else f"{progress.epoch:g}"
        rows["learning rate"] = None if progress.learning_rate is None else f"{progress.learning_rate:.3g}"
        rows["time left"] = None if progress.seconds_left is None else age_text(progress.seconds_left)
    if metrics is not None:
        rows["loss"] = None if metrics.train_loss is None else f"{metrics.train_loss:.4f}"
        rows["eval loss"] = None if metrics.eval_loss is None else f"{metrics.eval_loss:.4f}"
        rows["tokens"] = None if metrics.tokens is None else f"{metrics.tokens:,}"
        rows["cost"] = None if not metrics.cost else f"{metrics.cost:g} {metrics.currency or ''}".strip()
    return rows
