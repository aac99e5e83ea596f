"""Options that several verbs share, each declared once, and what they set up."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer

from luthier.distributed.outcome import FOLDER

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"], typer.Option("--log-level", help="The least level that is logged.")
]
LogFormat = Annotated[Literal["console", "json"], typer.Option("--log-format", help="Lines for people, or JSON lines.")]
LogFile = Annotated[Path | None, typer.Option("--log-file", help="Append the log to this file as well.")]

Step = Annotated[int | None, typer.Option(help="The run's checkpoint after this step.", min=1)]
Best = Annotated[bool, typer.Option("--best", help="The run's checkpoint of its best evaluation.")]
AllowChanged = Annotated[
    str, typer.Option(help="What may differ when a run is resumed: data, parts, model, settings, separated by commas.")
]


def start_api(level: Any, form: Any, file: Path | None) -> ModuleType:
    """Set up the log, and return the Python API."""
    from luthier import api, logs

    logs.set_up(level, form, file)
    return api


def is_first_speaker() -> bool:
    """Return True if this process prints notes for the user, as no process that started it has printed them already."""
    return os.environ.get("RANK", "0") == "0" and FOLDER not in os.environ
