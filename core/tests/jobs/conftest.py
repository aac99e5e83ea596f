"""What tests of jobs share: a clock that tests turn, a service in memory, and a folder for the store."""

import asyncio
import json
from pathlib import Path

import attrs
import pytest
from luthier import Capabilities, EventPage, JobEvent, JobState, JobStatus, Manager
from luthier.jobs.store.job_store import JobStore


class TurnedClock:
    """Sleeping turns it on at once."""

    def __init__(self):
        self.time, self.slept = 1_000_000.0, []

    def now(self):
        return self.time

    def monotonic(self):
        return self.time

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


@attrs.define(slots=False)
class FileService:
    """The far side: jobs in a JSON file, so that processes share it. `faults` are raised after a create, in order."""

    path: Path
    faults: list = attrs.field(factory=list)
    before: list = attrs.field(factory=list)  # raised before a create, in order
    hidden: int = 0  # looks that do not yet see what was made
    log: list = attrs.field(factory=list)

    def jobs(self):
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def put(self, id, **changes):
        jobs = self.jobs()
        jobs[id] = {**jobs.get(id, {"state": "pending"}), **changes}
        self.path.write_text(json.dumps(jobs))

    def scope(self):
        return "file"

    async def check(self):
        return {}

    async def capabilities(self, model):
        return Capabilities(takes="recipe", poll=(1.0, 60.0))

    async def submit(self, job, uploads):
        self.log.append("submit")
        if self.before:
            raise self.before.pop(0)
        id = f"r{len(self.jobs()) + 1}"
        self.put(id, key=job.id)
        if self.faults:
            raise self.faults.pop(0)
        return await self.status(id)

    async def find(self, job, uploads):
        self.log.append("find")
        if self.hidden:
            self.hidden -= 1
            return []
        return [await self.status(id) for id, values in self.jobs().items() if values["key"] == job.id]

    async def status(self, remote_id):
        if self.before and self.before[0] == "status":
            self.before.pop(0)
            raise self.before.pop(0)
        known = {s.value: s for s in JobState}
        state = self.jobs()[remote_id]["state"]
        return JobStatus(remote_id=remote_id, state=known.get(state, JobState.UNKNOWN), raw_state=state)

    async def cancel(self, remote_id):
        self.log.append("cancel")
        self.put(remote_id, state="canceled")

    async def events(self, remote_id, cursor):
        begin = int(cursor or 0)
        page = [JobEvent(id=str(i), at=float(i), metrics={"step": float(i)}) for i in range(begin, min(begin + 3, 7))]
        return EventPage(events=page, cursor=str(begin + len(page)))


@pytest.fixture
def clock():
    return TurnedClock()


@pytest.fixture
def service(tmp_path):
    return FileService(tmp_path / "service.json")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{i} and {j} is", "completion": str(i + j)} for i in range(4) for j in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def manager(tmp_path, clock):
    made = Manager(store=JobStore(tmp_path / "store"), clock=clock)
    yield made
    made.close()


@pytest.fixture
def submitted(manager, service, rows):
    """Submit a job to the service, and return it."""

    def submit(**given):
        recipe = {"model": "demo", "data": str(rows)}
        return manager.submit_sync(recipe, provider=service, **given)

    return submit
