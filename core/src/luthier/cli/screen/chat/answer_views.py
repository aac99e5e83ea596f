"""The views of a chat's answers: streamed, in two columns beside the base model's, or as plain text."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from luthier.model.generation.conversation import Reply

Tell = Callable[[str], None]


@contextmanager
def show_stream(screen: Console) -> Iterator[Tell | None]:
    """Yield a function that writes the text of one answer as it comes; None in a pipe, which gets whole answers."""
    if not screen.is_terminal:
        yield None
        return
    yield write_piece
    sys.stdout.write("\n")


def write_piece(text: str) -> None:
    """Write a piece of an answer to the terminal at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def printable(text: str) -> str:
    """Return the text without characters that control a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class Columns:
    """A view of two answers beside each other, redrawn as they grow."""

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self.texts = {"base": "", "tuned": ""}
        self.live: Any = None

    @contextmanager
    def shown(self) -> Iterator[Columns]:
        """Show the columns within this context as they grow. Afterwards they stay on the screen."""
        from rich.live import Live

        with Live(console=self.screen, transient=True, refresh_per_second=8) as self.live:
            yield self
        self.screen.print(self._table())

    @contextmanager
    def column(self, name: str) -> Iterator[Tell]:
        """Yield a function that adds text to one column."""

        def tell(text: str) -> None:
            self.texts[name] += printable(text)
            self.live.update(self._table())

        yield tell

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True, header_style="bold")
        for name in self.texts:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*self.texts.values())
        return table


def ending_note(reply: Reply) -> str | None:
    """Return a note on an answer that was cut or stopped; None for a complete one."""
    if reply.ended == "length":
        return f"(cut after {reply.tokens} tokens; --max-new-tokens allows more)"
    return "(stopped)" if reply.ended == "left" else None
