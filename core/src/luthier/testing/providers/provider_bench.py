"""The bench on which a provider is tested: its fake behind a server of this machine, a manager, a clock."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from luthier.jobs.clock import use_clock
from luthier.jobs.manager import Manager
from luthier.jobs.store.job_store import JobStore
from luthier.plugins.providing.job_records import Job
from luthier.plugins.providing.job_state import JobState
from luthier.testing.laws import Subject
from luthier.testing.loopback import Fault, LoopbackServer, Reply, Request
from luthier.testing.providers.virtual_clock import VirtualClock

CANARY: Final = "a_canary-5e0b-key-that-must-not-show"  # `a` and a `_`: Anyscale's SDK checks that
KEY: Final = "PROVIDER_CANARY_KEY"  # the variable that holds the fake's key
ROWS: Final = 20


class FakeService(Protocol):
    """A fake of a hosted service, kept in memory, that the kit serves on this machine.

    `create`, `upload` and `download` are the method and a pattern of the path of these requests; `upload` is None if
    a job contains the recipe itself, `download` if the service gives no files. `signed` is a pattern of the paths
    behind signed links, which get no key; None if there are none. `states` maps each state that the service
    documents to ours. `settings` are recipe settings that it accepts.

    A fake may also have `reads`, a pattern of the paths of POST requests that only read, and `unknown`, the
    word by which the vendor's own SDK hides a state that it does not know.
    """

    model: str
    create: tuple[str, str]
    upload: tuple[str, str] | None
    download: tuple[str, str] | None
    signed: str | None
    states: Mapping[str, JobState]
    settings: Mapping[str, Any]

    def options(self, url: str, key: str) -> object:
        """Return the part's options for the server at `url`; `key` is a reference such as `env:NAME`."""

    def answer(self, request: Request) -> Reply:
        """Return the service's answer to a request."""

    def jobs(self) -> list[str]:
        """Return the ids of the jobs that were created."""

    def rows(self, id: str) -> list[Any]:
        """Return the rows that a job trains on, as they arrived."""

    def set_state(self, id: str, raw: str) -> None:
        """Move a job to one of the service's states, or to an unknown one."""


class Bench:
    """One fake, one server, and any number of managers over one store."""

    def __init__(self, subject: Subject, fake: FakeService, server: LoopbackServer, folder: Path) -> None:
        self.subject, self.fake, self.server, self.folder = subject, fake, server, folder
        self.clock = VirtualClock(time.time())
        self.rows = folder / "rows.jsonl"
        self.write_rows(ROWS)
        self.manager = self.start_manager()

    def write_rows(self, count: int, broken: int | None = None) -> None:
        """Write so many rows of questions and answers. The line `broken` is not JSON."""
        lines = [
            json.dumps({"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                                     {"role": "assistant", "content": str(2 * i)}]})
            for i in range(count)
        ]  # fmt: skip
        if broken is not None:
            lines[broken - 1] = '{"messages": ['
        self.rows.write_text("\n".join(lines) + "\n", "utf-8")

    def build(self) -> Any:
        """Return the part, configured for the server."""
        return self.subject.build(self.fake.options(self.server.url, f"env:{KEY}"))

    def start_manager(self, observer: Callable[[str, str], None] | None = None) -> Manager:
        """Return a further manager over the same store, as another process would have it."""
        return Manager(store=JobStore(self.folder / "store", observer), clock=self.clock)

    def submit(self, manager: Manager | None = None, part: Any = None, **more: Any) -> Job:
        """Submit the usual job, and return it."""
        recipe = {"model": self.fake.model, "data": str(self.rows), **self.fake.settings, **more}
        return (manager or self.manager).submit_sync(recipe, provider=part or self.build())

    def finish(self, job: Job, state: JobState = JobState.COMPLETED) -> None:
        """Let the service report that the job has ended."""
        raw = next(raw for raw, known in self.fake.states.items() if known == state)
        assert job.remote_id is not None
        self.fake.set_state(job.remote_id, raw)

    def fault(self, kind: Any, target: tuple[str, str], reply: Reply | None = None, times: int = 1) -> None:
        """Let requests of a method and path fail."""
        self.server.faults.append(Fault(kind=kind, method=target[0], path=target[1], reply=reply, times=times))

    def count(self, target: tuple[str, str]) -> int:
        """Return how many requests of a method and path came."""
        return self.server.count(*target)


@contextlib.contextmanager
def open_bench(subject: Subject) -> Iterator[Bench]:
    """Yield a new bench for one check; everything on it is removed afterwards."""
    assert subject.fake is not None
    fake: FakeService = subject.fake()
    server = LoopbackServer(fake.answer)
    before = os.environ.get(KEY)
    os.environ[KEY] = CANARY
    try:
        with server.running(), tempfile.TemporaryDirectory(prefix="luthier-bench-") as name:
            bench = Bench(subject, fake, server, Path(name))
            with use_clock(bench.clock):
                yield bench
            bench.manager.close()
    finally:
        os.environ.pop(KEY) if before is None else os.environ.update({KEY: before})
