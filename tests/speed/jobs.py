"""A store of many jobs: what the list costs, and the memory of a manager that polls many jobs at once."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.speed.sides import median
from tests.speed.table import Row

POLL = """
import asyncio, json, resource, sys
import luthier
from luthier.jobs.clock import SystemClock
from luthier.testing.loopback import LoopbackServer, Reply

server = LoopbackServer(lambda request: Reply(body={}))


class Service:
    "A service whose every look is one request."

    def scope(self):
        return "here"

    async def capabilities(self, model):
        return luthier.Capabilities(takes="recipe", poll=(1.0, 60.0), events=False)

    async def status(self, remote_id):
        client = luthier.ServiceClient(server.url, service="service", rate=10.0)
        await client.read_json("/" + remote_id)
        await client.close()
        return luthier.JobStatus(remote_id=remote_id, state=luthier.JobState.RUNNING, raw_state="running")

    async def check(self):
        return {}

    async def submit(self, job, uploads):
        raise AssertionError("every job exists")

    async def cancel(self, remote_id):
        raise AssertionError("no job is cancelled")

    async def close(self):
        pass


async def poll(manager, ids):
    service = Service()
    for id in ids:
        manager.use_provider(id, service)
    await asyncio.gather(*(manager.status(id) for id in ids))


manager = luthier.Manager(sys.argv[1])
ids = [job.id for job in manager.store.list_jobs(limit=50)]
clock = SystemClock()
with server.running():
    began = clock.monotonic()
    asyncio.run(poll(manager, ids))
    seconds = clock.monotonic() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
rate = (len(server.requests) - 1) / seconds
print(json.dumps({"peak_mb": peak, "requests_per_second": rate, "polled": len(server.requests), "torch": "torch" in sys.modules}))
"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1000)


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        _fill_store(Path(folder), arguments.jobs)
        environment = {**os.environ, "LUTHIER_JOBS": folder}
        seconds = [_list_seconds(environment) for _ in range(arguments.rounds or 5)]
        yield Row(case=f"luthier jobs, {arguments.jobs:,} in the store", ours=median(seconds), peer=None,
                  unit="s (cpu)", ratio=None)  # fmt: skip
        command = [sys.executable, "-c", POLL, folder]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        numbers: dict[str, Any] = json.loads(done.stdout)
        peak = numbers.pop("peak_mb")
        yield Row(case="a manager that polls 50 at once", ours=peak, peer=None, unit="MiB", ratio=None, more=numbers)


def _list_seconds(environment: dict[str, str]) -> float:
    """Return the processor time of `luthier jobs` in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "luthier", "jobs", "--json"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _fill_store(folder: Path, count: int) -> None:
    from luthier.jobs.store.job_store import JobStore
    from luthier.plugins.providing.job_records import JobSpec
    from luthier.plugins.providing.job_state import Stage

    store = JobStore(folder)
    for number in range(count):
        spec = JobSpec(
            id=f"20261129-000000-{number:010d}", provider="service", options={}, scope="here", model="m", method="sft",
            settings={"learning_rate": 1e-4}, folder=folder / "jobs" / str(number), output_dir=folder / "run",
            created=1.79e9 + number,
        )  # fmt: skip
        store.add_job(spec, 1.79e9 + number, Stage.CREATED, f"remote-{number}")
    store.close()
