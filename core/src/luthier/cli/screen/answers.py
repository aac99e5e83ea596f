"""The end of a command: an answer as tables or one JSON document, or an error with its exit status."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from luthier.errors import CODES, LuthierError
from luthier.timestamp import current_time

if TYPE_CHECKING:
    from rich.console import Console

STOPPED = "interrupted"  # the code of a command that the user stopped
INSTALL_LOCAL = 'pip install "luthier[local]"'


@attrs.frozen(kw_only=True)
class Answer:
    """The answer of a command: `document` for `--json`, and `view`, which draws it for people."""

    document: Mapping[str, Any]
    view: Callable[[Console], None]
    status: int = 0


@attrs.frozen(kw_only=True)
class Turns:
    """An answer that comes bit by bit.

    `work` gets a function that prints a document as one line of JSON (None for people), and returns the exit status.
    """

    work: Callable[[Callable[[Mapping[str, Any]], None] | None], int]


def conclude_command(work: Callable[[], object], *, as_json: bool, in_lines: bool = False) -> int:
    """Do the work, print its answer or error, and return the exit status.

    With `as_json` everything else that the work prints goes to standard error; with `in_lines` an error is a line of
    JSON, like the log's lines.
    """
    stdout, turn_by_turn = sys.stdout, False
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            answer = work()
            if isinstance(answer, Turns):
                turn_by_turn = True
                return answer.work(functools.partial(print_json_line, stdout=stdout) if as_json else None)
        if not isinstance(answer, Answer):
            return answer if isinstance(answer, int) else 0
        print_json(answer.document, stdout) if as_json else answer.view(make_console())
        stdout.flush()
        return answer.status
    except BrokenPipeError:
        # The reader (`head`, `less`) has gone, so the buffered output must not be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        return 1
    except BaseException as error:
        if isinstance(error, SystemExit) and not hasattr(error, "exit_status"):
            raise
        return report(error, stdout, as_json=as_json, in_lines=turn_by_turn if as_json else in_lines)


def report(error: BaseException, stdout: Any, *, as_json: bool, in_lines: bool = False) -> int:
    """Print an error where it belongs and return its exit status. Only an unforeseen error gets a traceback.

    With `in_lines` it is one line: the last document of a verb that prints one for each turn, or a line of the log.
    """
    translated = translate_error(error)
    status = getattr(error, "exit_status", None)
    if translated.code == "internal":
        traceback.print_exception(error, file=sys.stderr)
    if as_json:
        (print_json_line if in_lines else print_json)({"error": translated.to_dict()}, stdout)
    elif in_lines:
        level = "warning" if translated.code == STOPPED else "error"
        print_line(level, level, **translated.to_dict())
    else:
        print_error(translated)
    return status if isinstance(status, int) else translated.exit_status


def translate_error(error: BaseException) -> LuthierError:
    """Return any exception as an error with a code."""
    if isinstance(error, LuthierError):
        return error
    if isinstance(error, KeyboardInterrupt) or hasattr(error, "exit_status"):  # the engine's own, after its checkpoint
        return LuthierError(STOPPED, str(error) or "stopped by Ctrl-C")
    if hasattr(error, "format_message"):  # a usage error of typer's parser
        path = getattr(getattr(error, "ctx", None), "command_path", "luthier")
        return LuthierError("usage", error.format_message(), remedy=f"See `{path} --help`.")
    if isinstance(error, ModuleNotFoundError) and _is_local(error.name or ""):
        return LuthierError("dependency-missing", f"{error.name} is not installed", remedy=f"Run: {INSTALL_LOCAL}")
    return _of_system(error) or LuthierError("internal", f"{type(error).__name__}: {error}")


def _is_local(module: str) -> bool:
    """Return True if a module belongs to the packages of `luthier[local]`."""
    from luthier.plugins.requirements import of_extra

    return module.partition(".")[0] in {name.replace("-", "_") for name in of_extra("luthier", "local")}


def _of_system(error: BaseException) -> LuthierError | None:
    """Return an error for what the disk or its permissions refuse; None for other exceptions."""
    if not isinstance(error, OSError) or not error.filename:
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LuthierError("disk-full", "no space left", where=str(error.filename))
    if isinstance(error, PermissionError):
        return LuthierError("path-unwritable", error.strerror or "permission denied", where=str(error.filename))
    return None


def print_json(document: Mapping[str, Any], stdout: Any) -> None:
    """Print one JSON document. Numbers that JSON does not have become null."""
    print(json.dumps(_plain(document), indent=2, allow_nan=False), file=stdout)


def print_json_line(document: Mapping[str, Any], stdout: Any) -> None:
    """Print one JSON document on one line, at once."""
    print(json.dumps(_plain(document), allow_nan=False), file=stdout, flush=True)


def print_line(level: str, event: str, **fields: Any) -> None:
    """Print one line of JSON on standard error, as the log does with `--log-format json`."""
    document = _plain({"timestamp": current_time(), "level": level, "event": event, **fields})
    print(json.dumps(document, allow_nan=False), file=sys.stderr, flush=True)


def print_error(error: LuthierError) -> None:
    """Print a red line and its remedy on standard error, for the error and for those joined to it.

    Places with the same problem share one, and problems with the same remedy are neighbours. If the user stopped
    the command, that is not an error but a yellow notice.
    """
    from rich.text import Text

    screen = make_console(stderr=True)
    alike: dict[tuple[str, ...], list[LuthierError]] = {}
    for single in (error, *error.also):
        own = "" if single.found is None and single.where else str(single)
        alike.setdefault((single.code, single.problem, single.remedy, own), []).append(single)
    remedies = list(dict.fromkeys(single.remedy for single in (error, *error.also)))
    groups = sorted(alike.values(), key=lambda group: remedies.index(group[0].remedy))
    for group, following in itertools.zip_longest(groups, groups[1:]):
        first = group[0]
        style = "yellow" if first.code == STOPPED else "red"
        screen.print(Text(_red_lines(group), style=style), soft_wrap=True)
        if first.code == STOPPED and first.remedy == CODES[STOPPED].remedy:  # the notice's line says it already
            continue
        if first.remedy and (following is None or following[0].remedy != first.remedy):
            screen.print(Text(first.remedy), soft_wrap=True)


def _red_lines(group: list[LuthierError]) -> str:
    """Return the line of an error, or of several with the same problem with their places below."""
    first = group[0]
    line = re.sub(r"\n(?!  )", " ", first.line)  # lists keep their lines
    if len(group) > 1:
        line = f"at {len(group)} places: {first.problem}"
    places = "".join(f"\n  {single.where}" for single in group) if len(group) > 1 else ""
    return line if first.code == STOPPED else f"error: {line} [{first.code}]{places}"


def make_console(*, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; 120 columns if the output is not a terminal."""
    from rich.console import Console

    from luthier.cli.screen.pipe_console import PipeConsole

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 120
    form = Console if stream.isatty() else PipeConsole
    return form(file=stream, width=width, highlight=False, markup=False, emoji=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
