"""Several processes from one command: torchrun's flags, and what each process of a launch prints."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.screen.answers import Answer, translate_error

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.distributed.launch import Launch

NprocPerNode = Annotated[
    str | None,
    typer.Option("--nproc-per-node", metavar="N", help="Processes on this machine: N, gpu or cpu."),
]
Nnodes = Annotated[str | None, typer.Option("--nnodes", metavar="N", help="Machines that train together.")]
NodeRank = Annotated[int | None, typer.Option("--node-rank", help="This machine's number, from 0, where set by hand.")]
RdzvEndpoint = Annotated[str | None, typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="Where machines meet.")]
RdzvId = Annotated[str | None, typer.Option("--rdzv-id", help="A name that the machines of one run share.")]
MasterAddr = Annotated[str | None, typer.Option("--master-addr", help="The host of machine 0, with --node-rank.")]
MasterPort = Annotated[int | None, typer.Option("--master-port", help="Its port.")]
MaxRestarts = Annotated[
    int | None,
    typer.Option("--max-restarts", help="Restart from the last checkpoint so many times."),
]


def run_launched(asked: Launch, context: typer.Context, view: Callable[[Console, Any], None]) -> Answer | int:
    """Run the same command in every requested process. The answer is rank 0's, printed on its machine alone."""
    from luthier.distributed.launch import launch_flags, launch_processes

    document = launch_processes(asked, ["-m", "luthier", *without(context.find_root().obj, launch_flags())])
    if not document:
        return 0
    return Answer(document=document, view=lambda screen: view(screen, SimpleNamespace(**document)))


def without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the words of a command line without some flags and their values."""
    others, skip = [], False
    for word in words:
        name, _, value = word.partition("=")
        if skip:
            skip = False
        elif name in flags:
            skip = name == word and not value
        else:
            others.append(word)
    return others


def answer_once(work: Callable[[], Any], view: Callable[[Console, Any], None]) -> Answer | int:
    """Return the answer of `work`, printed once: by rank 0, or by the process that launched this one.

    An error is printed by the launcher, or, without one of ours, by the first process that meets it.
    """
    from luthier.distributed import orphans, outcome
    from luthier.distributed.world import World

    folder, rank = outcome.outcome_folder(), World.current().rank
    orphans.follow_launcher()
    if folder is not None:
        outcome.announce_rank(folder, rank)
    try:
        run = work()
    except BaseException as error:
        return _failed(error, rank)
    if folder is not None and rank == 0:
        outcome.leave_outcome(folder, rank, "answer", run.to_dict())
    if folder is not None or rank:
        return 0
    return Answer(document=run.to_dict(), view=lambda screen: view(screen, run))


def _failed(error: BaseException, rank: int) -> int:
    from luthier.distributed import outcome
    from luthier.distributed import store as notes
    from luthier.distributed.world import error_attributes

    folder, status, translated = outcome.outcome_folder(), getattr(error, "exit_status", None), translate_error(error)
    if folder is None:
        if not notes.claim_first(str(translated)):
            return status or translated.exit_status
        raise error
    if hasattr(error, "folder") and isinstance(status, int):  # stopped and saved, as all ranks have agreed
        outcome.leave_outcome(folder, rank, "stopped", {"status": status, "told": str(error)})
        return 0
    if translated.code == "internal":
        traceback.print_exception(error, file=sys.stderr)
    outcome.leave_outcome(folder, rank, "error", error_attributes(translated))
    return status or translated.exit_status
