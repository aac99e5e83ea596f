"""The progress bar: steps, loss, speed and time left on a terminal or in a notebook; elsewhere log lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from luthier.builtin.notebook import NotebookBar, runs_in_notebook
from luthier.logs import get_logger
from luthier.plugins.events import event
from luthier.plugins.records import NoOptions

EVERY: Final = 30.0  # seconds between log lines
log = get_logger()


class ProgressView:
    def __init__(self, options: NoOptions) -> None:
        self.options = options
        self._bar: Any = None
        self._task: Any = None
        self._notebook: NotebookBar | None = None
        self._said = time.monotonic()

    @event
    def run_started(self, run: Any) -> None:
        self._open(run, 0)

    @event
    def resumed(self, run: Any, step: int) -> None:
        self._open(run, step)

    @event
    def step_ended(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=_numbers(metrics))
        elif self._notebook is not None:
            self._notebook.update(step, _numbers(metrics))
        elif run.is_main and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            log.info("training", step=step, of=run.total_steps, loss=round(metrics["loss"], 4))

    @event
    def evaluated(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        if self._bar is not None and "eval_loss" in metrics:
            self._bar.console.print(f"step {step}: eval loss {metrics['eval_loss']:.4f}")
        elif run.is_main:
            log.info("evaluated", step=step, **{name: round(value, 4) for name, value in metrics.items()})

    @event
    def stopped(self, run: Any) -> None:
        self._close()

    @event
    def completed(self, run: Any) -> None:
        self._close()

    @event
    def failed(self, run: Any) -> None:
        self._close()

    def _open(self, run: Any, step: int) -> None:
        if run.is_main and runs_in_notebook():
            self._notebook = NotebookBar(run.total_steps, step)
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        if not console.is_terminal or not run.is_main:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("training", total=run.total_steps, completed=step, numbers="")
        self._bar.start()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._notebook is not None:
            self._notebook.close()
            self._notebook = None


def _numbers(metrics: Mapping[str, float]) -> str:
    speed = metrics.get("tokens_per_second", 0.0)
    return f"loss {metrics['loss']:.4f} · {speed:,.0f} tok/s" if "loss" in metrics else f"{speed:,.0f} tok/s"
