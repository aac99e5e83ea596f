"""Run Slurm's commands, and read their answers about jobs and their errors."""

from __future__ import annotations

import asyncio
from typing import Final

from luthier import JobState, LuthierError, ProviderError

WORDS: Final = (  # our state, and Slurm's words for it
    (JobState.PENDING, "PENDING CONFIGURING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SUSPENDED SPECIAL_EXIT"),
    (JobState.RUNNING, "RUNNING COMPLETING SIGNALING STAGE_OUT STOPPED RESIZING"),
    (JobState.CANCELED, "CANCELLED"),
    (JobState.FAILED, "FAILED TIMEOUT NODE_FAIL OUT_OF_MEMORY BOOT_FAIL DEADLINE PREEMPTED REVOKED"),
    (JobState.FAILED, "COMPLETED"),  # only a job whose worker never began
)
STATES: Final = {word: state for state, words in WORDS for word in words.split()}
TOLD: Final = (  # text in sbatch's output, and the kind of error
    ("socket timed out", "lost"),  # the job may have been submitted
    ("zero bytes were transmitted", "lost"),
    ("unable to contact slurm controller", "network"),
    ("limit", "quota"),
    ("not permitted", "permission"),
    ("access denied", "permission"),
)


async def run_command(words: list[str], text: str = "") -> str:
    """Return the output of a command of Slurm, or raise its error."""
    where = f"slurm: {words[0]}"
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except FileNotFoundError:
        remedy = "Submit on a machine of the cluster that has Slurm's commands."
        raise LuthierError(
            "dependency-missing", f"{words[0]} is not installed here", where=where, remedy=remedy
        ) from None
    output, said = await process.communicate(text.encode())
    if process.returncode == 0:
        return output.decode("utf-8", "replace")
    complaint = said.decode("utf-8", "replace").strip() or f"it ended with status {process.returncode}"
    kind = next((kind for part, kind in TOLD if part in complaint.lower()), "invalid")
    if process.returncode is not None and process.returncode < 0:
        kind = "lost"
    raise ProviderError(kind, complaint.splitlines()[-1], where=where)


async def find_queued(name: str) -> tuple[str, str, str] | None:
    """Return number, state and reason of the newest job of a name, from the queue or the accounting."""
    lines = (await run_command(["squeue", "--noheader", f"--name={name}", "--format=%i|%T|%r"])).split()
    if not lines:
        try:
            output = await run_command(["sacct", "--noheader", "--allocations", "--parsable2", f"--name={name}",
                                      "--format=JobID,State,Reason"])  # fmt: skip
        except (LuthierError, ProviderError):  # many clusters have no accounting
            return None
        lines = [line.replace(" ", "_") for line in output.splitlines() if line.strip()]
    if not lines:
        return None
    number, state, reason = [*lines[-1].split("|"), "", ""][:3]
    return number, state.split("_by_")[0], reason.replace("_", " ")
