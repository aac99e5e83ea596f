"""The console of a pipe: lines end with their last character, where a terminal's tables are filled up with spaces."""

from __future__ import annotations

from typing import Any

from rich.console import Console


class PipeConsole(Console):
    """A console whose `print` leaves out the spaces at the ends of lines. `out` writes text as it is."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print objects as rich does, without spaces at the ends of their lines."""
        with self.capture() as captured:
            super().print(*objects, **settings)
        self.file.write("\n".join(line.rstrip(" ") for line in captured.get().split("\n")))

    def out(self, *objects: Any, sep: str = " ", end: str = "\n", style: Any = None, highlight: Any = None) -> None:
        """Write texts as they are, such as a model's answer."""
        self.file.write(sep.join(map(str, objects)) + end)
