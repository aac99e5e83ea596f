"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from luthier.errors import LuthierError, unwritable_path

if TYPE_CHECKING:
    from luthier.model.generation.conversation import Conversation

HELP: Final = """/reset         begin a new conversation; the system message stays
/system TEXT   put this system message before the conversation; without TEXT, none
/save FILE     add the conversation to a file of rows (JSON lines), as training reads them; saved again, its row grows
/help          this list
/quit          leave, as Ctrl-D does
A message that begins with a slash is written with two. Ctrl-C stops an answer."""


class Leave(Exception):
    """The wish to leave the chat."""


def run_command(line: str, talks: Sequence[Conversation], say: Callable[[str], None]) -> None:
    """Run the command of a line for each of the conversations. Raises `usage` for an unknown command.

    Of two conversations the last one is saved.
    """
    name, _, text = line[1:].partition(" ")
    commands: dict[str, Callable[[str], None]] = {
        "reset": lambda _: _reset(talks, say),
        "system": lambda text: _set_system(talks, text, say),
        "save": lambda text: _save_talk(talks[-1], text, say),
        "help": lambda _: say(HELP),
        "quit": _leave,
    }
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        remedy = f"Did you mean /{near[0]}?" if near else "/help lists them; a message may begin with two slashes."
        raise LuthierError("usage", "there is no such command", where=f"/{name}", remedy=remedy)
    commands[name](text.strip())


def _reset(talks: Sequence[Conversation], say: Callable[[str], None]) -> None:
    for talk in talks:
        talk.reset()
    say("a new conversation")


def _set_system(talks: Sequence[Conversation], text: str, say: Callable[[str], None]) -> None:
    for talk in talks:
        talk.set_system(text or None)
    say(f"system: {text}" if text else "no system message")


def _save_talk(talk: Conversation, name: str, say: Callable[[str], None]) -> None:
    if not name:
        raise LuthierError("usage", "the file's name is missing", where="/save", remedy="Write /save FILE.")
    if not talk.messages:
        raise LuthierError("usage", "the conversation is empty", where="/save", remedy="Ask something first.")
    path = Path(name).expanduser()
    row = (json.dumps({"messages": talk.rows()}, ensure_ascii=False) + "\n").encode()
    try:
        put_row(path, row, talk.saved.get(path.absolute(), b""))
    except OSError as error:
        raise unwritable_path(path, error) from None
    talk.saved[path.absolute()] = row
    say(f"saved: {path}, {len(talk.rows())} messages")


def put_row(path: Path, row: bytes, before: bytes) -> None:
    """Add a row to a file, or replace the row of the same conversation if that is still the last one."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - len(before)))
        if before and file.read() == before:
            file.truncate(start)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        is_cut = size > 0 and file.read(1) != b"\n"  # the last line of a file that somebody wrote by hand
        file.write(b"\n" * is_cut + row)


def _leave(_: str) -> None:
    raise Leave
