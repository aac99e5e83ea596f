"""Notebooks: the kernel that a process runs in shows what terminals show, without any library of its own."""

from __future__ import annotations

import html
import sys
import time
from pathlib import Path
from typing import Any, Final

EVERY: Final = 0.2  # seconds between two redraws of a bar


def runs_in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    library = sys.modules.get("IPython")
    shell = library.get_ipython() if library is not None else None
    return getattr(shell, "kernel", None) is not None


def show_picture(path: Path) -> None:
    """Show a PNG below the cell that runs."""
    from IPython.display import Image, display

    display(Image(filename=str(path)))


class NotebookBar:
    """A progress bar below the cell that runs, drawn again in its place."""

    def __init__(self, total: int | None, step: int) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._began, self._drawn = time.monotonic(), 0.0
        self._first, self._step, self._total, self._numbers = step, step, total, ""
        self._handle: Any = display(HTML(self._markup()), display_id=True)

    def update(self, step: int, numbers: str) -> None:
        """Move the bar; it is drawn at most so often as one can see."""
        self._step, self._numbers = step, numbers
        if time.monotonic() - self._drawn >= EVERY:
            self._draw()

    def close(self) -> None:
        """Draw the last state."""
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._handle.update(self._html(self._markup()))

    def _markup(self) -> str:
        return bar_markup(
            self._step, self._total, self._numbers, time.monotonic() - self._began, self._step - self._first
        )


def bar_markup(step: int, total: int | None, numbers: str, seconds: float, done: int) -> str:
    """Return the bar as HTML: the share done, `step/total`, numbers, the time so far and the time left.

    `done` counts the steps of this process, by which the time left is told. `total` None: the end is not known.
    """
    share = f' value="{step}" max="{total}"' if total else ""
    left = f", {_clock(seconds / done * (total - step))} left" if total and done else ""
    caption = f"training {step}/{total if total else '?'} · {numbers} · {_clock(seconds)}{left}"
    return f"<progress{share}></progress> <code>{html.escape(caption)}</code>"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
