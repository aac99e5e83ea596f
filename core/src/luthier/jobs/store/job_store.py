"""Jobs in the store: written down before anything is done, found by id, and moved from stage to stage."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError
from luthier.jobs.secret import redact_text, redact_value
from luthier.jobs.store.database import Database, default_place
from luthier.plugins.providing.job_records import Job, JobSpec, JobStatus, from_plain_data, to_plain_data
from luthier.plugins.providing.job_state import JobState, Stage, advance_state

Observer = Callable[[str, str], None]  # called with job and step, once a step of the journal is on the disk
CHOSEN: Final = "WHERE (?1 IS NULL OR state = ?1) AND (?2 IS NULL OR provider = ?2)"


class JobStore:
    """The jobs of a folder. Each change is one transaction, so that another process sees all of it or nothing.

    `observer` is called after each step of the journal; tests end the process there.
    """

    def __init__(self, folder: Path | None = None, observer: Observer | None = None) -> None:
        self.database = Database(folder or default_place())
        self._observer = observer

    @property
    def folder(self) -> Path:
        return self.database.folder

    def add_job(self, spec: JobSpec, now: float, stage: Stage = Stage.INTENT, remote_id: str | None = None) -> Job:
        """Write down a new job before anything is done for it."""
        names = "id, provider, scope, spec, stage, state, remote_id, updated"
        known = (spec.id, spec.provider, spec.scope, _text(to_plain_data(spec)))
        values = (*known, stage, JobState.PENDING, remote_id, now)
        with self.database.write() as connection:
            connection.execute(f"INSERT INTO jobs ({names}) VALUES (?,?,?,?,?,?,?,?)", values)
            _note(connection, spec.id, now, stage, {})
        self._tell(spec.id, stage)
        return self.get_job(spec.id)

    def get_job(self, id: str) -> Job:
        """Return the job with exactly this id. Raises `job-not-found`."""
        rows = self.database.read("SELECT * FROM jobs WHERE id = ?", (id,))
        if not rows:
            raise LuthierError("job-not-found", f"there is no job {id!r}", where=str(self.database.path))
        return _job(rows[0])

    def find_job(self, name: str) -> Job:
        """Return the job with this id, the beginning or end of an id, or the service's own id.

        Raises `job-not-found` and `job-ambiguous`.
        """
        exact = self.database.read("SELECT * FROM jobs WHERE id = ? OR remote_id = ?", (name, name))
        escaped = name.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        query = "SELECT * FROM jobs WHERE id LIKE ? ESCAPE '\\' OR id LIKE ? ESCAPE '\\' ORDER BY id LIMIT 6"
        rows = exact or (self.database.read(query, (f"{escaped}%", f"%{escaped}")) if name else [])
        if not rows:
            remedy = "List them with `luthier jobs`."
            raise LuthierError("job-not-found", f"there is no job {name!r}", where=str(self.folder), remedy=remedy)
        if len(rows) > 1:
            raise LuthierError("job-ambiguous", f"{name!r} may mean {' or '.join(row['id'] for row in rows)}")
        return _job(rows[0])

    def list_jobs(self, status: str | None = None, provider: str | None = None, limit: int | None = None) -> list[Job]:
        """Return jobs, newest first; only those of a state and a provider if these are given."""
        query = f"SELECT * FROM jobs {CHOSEN} ORDER BY id DESC LIMIT ?3"
        return [_job(row) for row in self.database.read(query, (status, provider, limit or -1))]

    def count_jobs(self, status: str | None = None, provider: str | None = None) -> int:
        """Return how many jobs of a state and a provider there are. None means any."""
        return int(self.database.read(f"SELECT count(*) FROM jobs {CHOSEN}", (status, provider))[0][0])

    def enter_stage(self, id: str, stage: Stage, now: float, **detail: Any) -> Job:
        """Write a stage into the journal, before the act that it announces."""
        return self._change(id, now, stage, detail, {"stage": stage})

    def note_upload(self, job: Job, role: str, remote_id: str, now: float) -> Job:
        """Write into the journal that the service has a file, and remember it for other jobs with the same bytes."""
        uploads = {**self.get_job(job.id).uploads, role: remote_id}
        known = (job.spec.scope, job.spec.files[role].sha256, remote_id)
        detail = {"role": role, "remote_id": remote_id}
        return self._change(job.id, now, f"uploaded {role}", detail, {"uploads": _text(uploads)}, known)

    def known_upload(self, scope: str, sha256: str) -> str | None:
        """Return the service's id of a file with these bytes that was uploaded before; None if there is none."""
        query = "SELECT remote_id FROM uploads WHERE scope = ? AND sha256 = ?"
        rows = self.database.read(query, (scope, sha256))
        return rows[0]["remote_id"] if rows else None

    def note_created(self, id: str, status: JobStatus, now: float, *, found: bool) -> Job:
        """Write into the journal that the job exists at its service: as answered, or as `found` there later.

        Raises `job-unclear` if another job of the store has the same job at the service.
        """
        columns = {"stage": Stage.CREATED, "remote_id": status.remote_id}
        try:
            self._change(id, now, Stage.CREATED, {"remote_id": status.remote_id, "found": found}, columns)
        except sqlite3.IntegrityError:
            problem = f"the service's job {status.remote_id} already belongs to another job here"
            raise LuthierError("job-unclear", problem, where=id) from None
        return self.save_status(id, status, now)[0]

    def note_refused(self, id: str, reason: str, now: float) -> Job:
        """Write into the journal that the service refused the job, which has failed without ever existing."""
        redacted = redact_text(reason)
        return self._change(id, now, Stage.REFUSED, {"reason": redacted},
                            {"stage": Stage.REFUSED, "state": JobState.FAILED, "reason": redacted})  # fmt: skip

    def note_step(self, id: str, step: str, now: float, **detail: Any) -> Job:
        """Write any other step into the journal."""
        return self._change(id, now, step, detail, {})

    def request_cancel(self, id: str, now: float) -> Job:
        """Write the wish to cancel into the journal, before the service is asked."""
        first = self.get_job(id).cancel_requested
        return self._change(id, now, "cancel requested", {}, {"cancel_requested": first or now})

    def note_canceled(self, id: str, reason: str, now: float) -> Job:
        """Write into the journal that a job was given up before it existed at its service."""
        return self._change(id, now, "canceled", {"reason": reason}, {"state": JobState.CANCELED, "reason": reason})

    def save_status(self, id: str, status: JobStatus, now: float) -> tuple[Job, bool]:
        """Store a provider's report; return the job, and True if the report was legal. A final state is never left."""
        with self.database.write() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
            job = _job(row)
            state, legal = advance_state(job.state, status.state)
            if legal:
                changed = (state, status.raw_state) != (job.state, job.raw_state)
                values = (state, status.raw_state, status.phase, redact_text(status.reason) if status.reason else None,
                          _text(redact_value(to_plain_data(status))), now)  # fmt: skip
                connection.execute(
                    "UPDATE jobs SET state=?, raw_state=?, phase=?, reason=?, status=?, updated=? WHERE id=?",
                    (*values, id),
                )
                if changed:
                    _note(connection, id, now, f"state {state}", {"raw_state": status.raw_state})
        return self.get_job(id), legal

    def journal(self, id: str) -> list[dict[str, Any]]:
        """Return the steps of a job, oldest first."""
        rows = self.database.read("SELECT at, step, detail FROM journal WHERE job = ? ORDER BY number", (id,))
        return [{"at": row["at"], "step": row["step"], **json.loads(row["detail"])} for row in rows]

    def close(self) -> None:
        """Close the store's file."""
        self.database.close()

    def _change(
        self, id: str, now: float, step: str, detail: Mapping[str, Any], columns: Mapping[str, Any],
        upload: tuple[str, str, str] | None = None,
    ) -> Job:  # fmt: skip
        """Set columns, whose names come from this module, and write the step into the journal, in one transaction."""
        names = "".join(f"{name} = ?, " for name in columns)
        with self.database.write() as connection:
            connection.execute(f"UPDATE jobs SET {names}updated = ? WHERE id = ?", (*columns.values(), now, id))
            if upload is not None:
                connection.execute("INSERT OR REPLACE INTO uploads VALUES (?,?,?)", upload)
            _note(connection, id, now, step, detail)
        self._tell(id, step)
        return self.get_job(id)

    def _tell(self, id: str, step: str) -> None:
        if self._observer is not None:
            self._observer(id, str(step))


def _job(row: sqlite3.Row) -> Job:
    spec = from_plain_data(json.loads(row["spec"]), JobSpec, "the store's job")
    status = None if row["status"] is None else from_plain_data(json.loads(row["status"]), JobStatus, "the status")
    return Job(
        spec=spec,
        stage=Stage(row["stage"]),
        state=JobState(row["state"]),
        raw_state=row["raw_state"],
        phase=row["phase"],
        reason=row["reason"],
        remote_id=row["remote_id"],
        status=status,
        uploads=json.loads(row["uploads"]),
        cancel_requested=row["cancel_requested"],
        updated=row["updated"],
    )


def _note(connection: sqlite3.Connection, id: str, now: float, step: str, detail: Mapping[str, Any]) -> None:
    values = (id, now, str(step), _text(redact_value(dict(detail))))
    connection.execute("INSERT INTO journal (job, at, step, detail) VALUES (?,?,?,?)", values)


def _text(value: Any) -> str:
    return json.dumps(value, default=str)
