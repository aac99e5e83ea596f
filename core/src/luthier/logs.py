"""Logging: structlog events with the run's id, to standard error, a file, and the run's own log.jsonl.

The library keeps its own chain, so a program that configures structlog for itself is left as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Literal, TextIO

import attrs
import structlog
from structlog.typing import EventDict, WrappedLogger

from luthier.errors import unwritable_path

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["console", "json"]
NUMBERS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


@attrs.frozen(kw_only=True, eq=False)
class Sink:
    """Where lines go: `write` takes one line without its end, `render` makes it of an event."""

    level: Level
    render: Callable[[EventDict], str]
    write: Callable[[str], object]


_SINKS: list[Sink] = []


def get_logger() -> Any:
    """Return the library's logger: `log.info("event", field=value)`. Fields of `run_log` are added to each line."""
    return structlog.wrap_logger(
        None,
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _deliver,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(NUMBERS["debug"]),
    )


def set_up(level: Level = "info", form: Format = "console", file: str | Path | None = None) -> None:
    """Send lines of `level` and above to standard error and, beside it, to the end of `file`.

    Of several ranks the first speaks for all: the others tell errors only, and write no file.
    """
    _close()
    if os.environ.get("RANK", "0") != "0":
        level, file = "error", None
    _SINKS.append(Sink(level=level, render=_json if form == "json" else _coloured, write=_to_stderr))
    if file is not None:
        stream = _opened(Path(file))
        _FILES.append(stream)
        _SINKS.append(Sink(level=level, render=_json if form == "json" else _plain, write=_appender(stream)))


@contextlib.contextmanager
def run_log(run_id: str, path: Path) -> Iterator[None]:
    """Add the run's id to every line within this context, and append all lines, `debug` too, to `path` as JSON.

    What other libraries warn of is logged as well.
    """
    if not _SINKS:
        set_up("warning")
    with _opened(path) as stream, structlog.contextvars.bound_contextvars(run=run_id):
        sink = Sink(level="debug", render=_json, write=_appender(stream))
        _SINKS.append(sink)
        try:
            with _warnings_logged():
                yield
        finally:
            if sink in _SINKS:
                _SINKS.remove(sink)


@contextlib.contextmanager
def _warnings_logged() -> Iterator[None]:
    """Log the warnings of other libraries instead of printing them; what a future version will do at `info`."""
    printed = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        deprecated = issubclass(category, (FutureWarning, DeprecationWarning, PendingDeprecationWarning))
        say = get_logger().info if deprecated else get_logger().warning
        kind = "deprecation" if deprecated else category.__name__
        say(kind, message=str(message), where=f"{filename}:{lineno}")

    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = printed


@contextlib.contextmanager
def muted_logs() -> Iterator[None]:
    """Log nothing within this context, because a rehearsal must not say what the run itself will say."""
    sinks, _SINKS[:] = list(_SINKS), [Sink(level="error", render=str, write=len)]
    try:
        yield
    finally:
        _SINKS[:] = sinks


@contextlib.contextmanager
def captured_logs() -> Iterator[list[dict[str, Any]]]:
    """Yield the lines that are logged within this context, with `event`, `level` and fields; none goes elsewhere."""
    lines: list[dict[str, Any]] = []
    sinks = list(_SINKS)
    _SINKS[:] = [Sink(level="debug", render=_json, write=lambda line: lines.append(json.loads(line)))]
    try:
        yield lines
    finally:
        _SINKS[:] = sinks


_FILES: list[FileIO] = []


def _close() -> None:
    _SINKS.clear()
    for stream in _FILES:
        stream.close()
    _FILES.clear()


def _deliver(_: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Last in the chain: hand the event to each sink whose level it reaches; nothing is left for structlog."""
    if not _SINKS:
        set_up("warning")
    for sink in _SINKS:
        if NUMBERS[event["level"]] >= NUMBERS[sink.level]:
            with contextlib.suppress(OSError):  # a full disk or a closed pipe must not end a run because of a log line
                sink.write(sink.render(dict(event)))
    raise structlog.DropEvent


def _json(event: EventDict) -> str:
    first = {key: event.pop(key) for key in ("timestamp", "level", "run", "event") if key in event}
    return json.dumps({**first, **event}, default=str)


def _coloured(event: EventDict) -> str:
    return _console(event, colours=sys.stderr.isatty())


def _plain(event: EventDict) -> str:
    return _console(event, colours=False)


def _console(event: EventDict, *, colours: bool) -> str:
    renderer = structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=0, sort_keys=False)
    return str(renderer(None, event["level"], event))


def _to_stderr(line: str) -> None:
    # sys.stderr is looked up for each line, because a live progress bar replaces it so that lines appear above it
    print(line, file=sys.stderr, flush=True)


def _appender(stream: FileIO) -> Callable[[str], object]:
    def write(line: str) -> None:
        stream.write(f"{line}\n".encode())

    return write


def _opened(path: Path) -> FileIO:
    """Unbuffered: a line that a full disk refused must not be refused again when the file is closed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)
    except OSError as error:
        raise unwritable_path(path, error) from None
