"""Runs that are sent whole to a place without a desk: a parcel goes there, and lines of output come back."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.errors import LuthierError
from luthier.jobs.desk.metric_lines import read_line_event
from luthier.jobs.desk.parcel import RECIPE, TRAIN, pack_job
from luthier.plugins.providing.job_records import JobEvent, JobSpec
from luthier.recipe import Recipe
from luthier.recipe.parts import resolve_parts

WORKER: Final = "luthier.builtin.workers.sent_worker"
MARK: Final = "luthier-told:"  # begins a line of a run's output that is meant for this module
VARIABLE: Final = "PARCEL_OF_LUTHIER_"  # LUTHIER_... would be read as options of a recipe
PIECE: Final = 100_000  # characters of one variable, of which Linux allows 131,072


@attrs.frozen(kw_only=True)
class ToldRun:
    """The state of a run, read from its output. `code` and `reason` are None until it has ended.

    `results` maps kinds to paths; `archive` is a folder that the run sent, as a packed tar in base64.
    """

    events: list[JobEvent]
    code: int | None = None
    reason: str | None = None
    results: Mapping[str, str] = attrs.field(factory=dict)
    archive: str | None = attrs.field(default=None, repr=False)


def sent_words(act: str, folder: str) -> list[str]:
    """Return the arguments of the remote Python.

    `run` unpacks the parcel in a folder and trains; `give` prints one of its folders as lines.
    """
    return ["-m", WORKER, act, folder]


@attrs.frozen(kw_only=True)
class Parcel:
    """A job's recipe, rows and launch as a packed tar, and the packages that must be installed where it is unpacked."""

    content: bytes = attrs.field(repr=False)
    packages: list[str]


def pack_parcel(
    job: JobSpec, folder: str, processes: str | None = None, *, run: str | None = None, command: Sequence[str] = TRAIN
) -> Parcel:
    """Return the parcel of a job, to be unpacked in the remote `folder`. The same job always gives the same bytes.

    `run` is the folder of its run if it is not inside `folder`; `command` are the arguments of Python before the
    recipe's path.

    Raises `data-row` if a line of its rows is no JSON.
    """
    recipe = Recipe.load(job.folder / RECIPE, environ={})
    files = pack_job(job, folder, processes, recipe=recipe, run=run, command=command)
    for name, path in files.items():
        if name.endswith(".jsonl"):
            _check_lines(path)
    return Parcel(content=_pack_files(files), packages=_list_packages(recipe))


def _pack_files(files: Mapping[str, Path]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, path in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = path.stat().st_size, 0o600
            with path.open("rb") as file:
                tar.addfile(member, file)
    return gzip.compress(packed.getvalue(), mtime=0)


def _list_packages(recipe: Recipe) -> list[str]:
    """Return the distributions of Luthier and of the recipe's parts, each with its version."""
    pairs = {(part.source.distribution, part.source.version) for part in resolve_parts(recipe) if part.source}
    others = sorted(f"{name}=={at}" for name, at in pairs if name != "luthier")
    return [f"luthier[local]=={version('luthier')}", *others]


def parcel_variables(content: bytes, largest: int) -> dict[str, str]:
    """Return a parcel's content as environment variables of at most `largest` characters in all.

    Raises `provider-unsupported` if it is larger.
    """
    text = base64.b64encode(content).decode()
    if len(text) > largest:
        remedy = "Name a data set of the hub, or a path of the other machine that holds the rows."
        problem = f"the recipe and its rows are {len(text)} characters when packed; at most {largest} can be sent"
        raise LuthierError("provider-unsupported", problem, where="data.train", remedy=remedy)
    return {f"{VARIABLE}{i // PIECE:03}": text[i : i + PIECE] for i in range(0, len(text), PIECE)}


def join_parcel(variables: Mapping[str, str]) -> bytes:
    """Return the content that `parcel_variables` put into these variables."""
    pieces = sorted(name for name in variables if name.startswith(VARIABLE))
    return base64.b64decode("".join(variables[name] for name in pieces))


def read_told(lines: Iterable[str]) -> ToldRun:
    """Return what the lines of a run's output say. Lines without the mark, or cut short, are ignored."""
    run = ToldRun(events=[])
    for line in lines:
        _, mark, text = line.partition(MARK)
        try:
            values = json.loads(text) if mark else None
        except ValueError:
            continue
        if isinstance(values, dict):
            run = _add_line(run, values)
    return run


def write_told(**values: Any) -> str:
    """Return the line of output that carries these values."""
    return f"{MARK} {json.dumps(values)}"


def _add_line(run: ToldRun, values: Mapping[str, Any]) -> ToldRun:
    if "code" in values:
        return attrs.evolve(run, code=int(values["code"]), reason=values.get("reason"), results=values["results"])
    if "archive" in values:
        return attrs.evolve(run, archive=str(values["archive"]))
    at = float(values.get("at", 0.0))
    if "total_steps" in values:
        numbers: dict[str, float | None] = {"total_steps": float(values["total_steps"])}
        event: JobEvent | None = JobEvent(id="total-steps", at=at, metrics=numbers, message="begun")
    else:
        event = read_line_event(str(values.get("line", "")).encode(), at)
    return run if event is None else attrs.evolve(run, events=[*run.events, event])


def _check_lines(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    json.loads(line)
            except ValueError as error:
                remedy = "Nothing was sent. Correct the rows named."
                raise LuthierError("data-row", f"no JSON: {error}", where=f"{path}:{number}", remedy=remedy) from None
