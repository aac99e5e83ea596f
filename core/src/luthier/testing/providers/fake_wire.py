"""A service that speaks OpenAI's wire format, on this machine, faithful enough for OpenAI's own SDK 2.54.0."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Any, Final

from luthier.plugins.providing.job_state import JobState
from luthier.testing.loopback import Reply, Request

CSV: Final = b"step,train_loss\n1,2.0\n2,1.0\n" * 5000


class FakeWire:
    """Everything that the kit requires of a fake, except `options`, which the service's own fake adds.

    `key_header` is the header that must hold the key; with `heeds_filter` False lists ignore the filter.
    """

    model = "gpt-4.1-mini-2025-04-14"
    create: tuple[str, str] = ("POST", r"/v1/fine_tuning/jobs$")
    upload: tuple[str, str] = ("POST", r"/v1/files$")
    download: tuple[str, str] | None = None
    signed: str | None = None
    settings: Mapping[str, Any] = {"num_train_epochs": 2.0, "seed": 7}
    states: Mapping[str, JobState] = {
        "validating_files": JobState.PENDING, "queued": JobState.PENDING, "paused": JobState.PENDING,
        "running": JobState.RUNNING, "succeeded": JobState.COMPLETED, "failed": JobState.FAILED,
        "cancelled": JobState.CANCELED,
    }  # fmt: skip

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.tunes: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.key_header, self.heeds_filter = "authorization", True

    def jobs(self) -> list[str]:
        """Return the ids of the jobs that were made."""
        return list(self.tunes)

    def set_state(self, id: str, raw: str) -> None:
        """Move a job to a state, and set the fields that a job has in it."""
        self.tunes[id]["status"] = raw
        if raw == "succeeded":
            tuned = f"ft:{self.tunes[id]['model']}:me::{id}"
            self.tunes[id] |= {"fine_tuned_model": tuned, "finished_at": int(time.time()), "trained_tokens": 4321,
                               "result_files": ["file-result"]}  # fmt: skip
        if raw == "failed":
            self.tunes[id]["error"] = {"code": "exceeded_quota", "message": "line 3 is odd", "param": "training_file"}

    def rows(self, id: str) -> list[Any]:
        """Return the rows that a job trains on."""
        return [json.loads(line) for line in self.files[self.tunes[id]["training_file"]]["content"].splitlines()]

    def answer(self, request: Request) -> Reply:
        """Return such a service's answer to a request."""
        if not request.headers.get(self.key_header):
            return _refused(401, "Missing API key")
        for (method, pattern), act in ROUTES.items():
            match = re.fullmatch(pattern, request.path)
            if method == request.method and match:
                return act(self, request, *match.groups())
        return _refused(404, f"no {request.method} {request.path}")

    def _take_file(self, request: Request) -> Reply:
        form = request.form()
        if form.get("purpose") != b"fine-tune" or "file" not in form:
            return _refused(400, "purpose or file is missing")
        id = f"file-{len(self.files) + 1}"
        self.files[id] = {"content": form["file"], "filename": form["file.filename"].decode()}
        return self._show_file(request, id)

    def _begin_upload(self, request: Request) -> Reply:
        body = request.json
        if set(body) != {"purpose", "filename", "bytes", "mime_type"}:
            return _refused(400, f"unexpected fields: {sorted(body)}")
        id = f"upload_{len(self.uploads) + 1}"
        self.uploads[id] = {**body, "id": id, "object": "upload", "created_at": int(time.time()), "status": "pending",
                            "expires_at": int(time.time()) + 3600, "parts": {}}  # fmt: skip
        return Reply(body=self.uploads[id])

    def _take_part(self, request: Request, id: str) -> Reply:
        if id not in self.uploads:
            return _refused(404, "no such upload")
        parts = self.uploads[id]["parts"]
        part = f"part_{len(parts) + 1}"
        parts[part] = request.form()["data"].decode("latin-1")
        created = int(time.time())
        return Reply(body={"id": part, "object": "upload.part", "created_at": created, "upload_id": id})

    def _end_upload(self, request: Request, id: str) -> Reply:
        upload = self.uploads[id]
        content = "".join(upload["parts"][part] for part in request.json["part_ids"]).encode("latin-1")
        if len(content) != upload["bytes"]:
            return _refused(400, f"expected {upload['bytes']} bytes, got {len(content)}")
        file = f"file-{len(self.files) + 1}"
        self.files[file] = {"content": content, "filename": upload["filename"]}
        shown = {**upload, "status": "completed", "file": self._show_file(request, file).body}
        return Reply(body={name: value for name, value in shown.items() if name != "parts"})

    def _show_file(self, request: Request, id: str) -> Reply:
        if id not in self.files:
            return _refused(404, "no such file")
        file = self.files[id]
        return Reply(body={"id": id, "object": "file", "bytes": len(file["content"]), "created_at": int(time.time()),
                           "filename": file["filename"], "purpose": "fine-tune", "status": "processed"})  # fmt: skip

    def _send_file(self, request: Request, id: str) -> Reply:
        return Reply(body=CSV) if id == "file-result" else _refused(404, "no such file")

    def _make_tune(self, request: Request) -> Reply:
        body = request.json
        if body.get("training_file") not in self.files or not body.get("model"):
            return _refused(400, "training_file or model is missing", "training_file")
        id = f"ftjob-{len(self.tunes) + 1}"
        method = body.get("method") or {"type": "supervised"}
        self.tunes[id] = {
            "id": id, "object": "fine_tuning.job", "status": "validating_files", "created_at": int(time.time()),
            "model": body["model"], "training_file": body["training_file"],
            "validation_file": body.get("validation_file"),
            "metadata": body.get("metadata"), "method": method, "seed": body.get("seed") or 1, "error": {},
            "hyperparameters": {"n_epochs": "auto"}, "fine_tuned_model": None, "finished_at": None,
            "trained_tokens": None,
            "organization_id": "org", "result_files": [], "integrations": [],
        }  # fmt: skip
        return Reply(body=self.tunes[id])

    def _show_tune(self, request: Request, id: str) -> Reply:
        return Reply(body=self.tunes[id]) if id in self.tunes else _refused(404, "no such job")

    def _list_tunes(self, request: Request) -> Reply:
        wanted = {k[9:-1]: v[0] for k, v in request.query.items() if k.startswith("metadata[")}
        newest = list(self.tunes.values())[::-1]
        if self.heeds_filter:
            newest = [t for t in newest if all((t["metadata"] or {}).get(k) == v for k, v in wanted.items())]
        return _page(request, newest)

    def _cancel_tune(self, request: Request, id: str) -> Reply:
        if self.tunes[id]["status"] in ("succeeded", "failed", "cancelled"):
            return _refused(400, "the job has ended")
        self.tunes[id]["status"] = "cancelled"
        return Reply(body=self.tunes[id])

    def _list_events(self, request: Request, id: str) -> Reply:
        steps = [
            {"id": f"ftevent-{s}", "object": "fine_tuning.job.event", "created_at": 1795848000 + s, "level": "info",
             "message": f"Step {s}/4", "type": "metrics", "data": {"step": s, "total_steps": 4, "train_loss": 4.0 / s}}
            for s in range(1, 5)
        ]  # fmt: skip
        first = {"id": "ftevent-0", "object": "fine_tuning.job.event", "created_at": 1795848000, "level": "warn",
                 "message": "Created", "type": "message", "data": None}  # fmt: skip
        return _page(request, [*steps[::-1], first])

    def _list_checkpoints(self, request: Request, id: str) -> Reply:
        point = {"id": "ftckpt_1", "object": "fine_tuning.job.checkpoint", "created_at": 1, "step_number": 2,
                 "fine_tuned_model_checkpoint": "ft:m:ckpt-2", "fine_tuning_job_id": id,
                 "metrics": {"step": 2, "train_loss": 2.0}}  # fmt: skip
        return _page(request, [point])

    def _list_models(self, request: Request) -> Reply:
        return Reply(
            body={"object": "list", "data": [{"id": self.model, "object": "model", "created": 1, "owned_by": "x"}]}
        )


ROUTES: Final[dict[tuple[str, str], Any]] = {
    ("GET", "/v1/models"): FakeWire._list_models,
    ("POST", "/v1/files"): FakeWire._take_file,
    ("GET", "/v1/files/([^/]+)"): FakeWire._show_file,
    ("POST", "/v1/uploads"): FakeWire._begin_upload,
    ("POST", "/v1/uploads/([^/]+)/parts"): FakeWire._take_part,
    ("POST", "/v1/uploads/([^/]+)/complete"): FakeWire._end_upload,
    ("GET", "/v1/files/([^/]+)/content"): FakeWire._send_file,
    ("POST", "/v1/fine_tuning/jobs"): FakeWire._make_tune,
    ("GET", "/v1/fine_tuning/jobs"): FakeWire._list_tunes,
    ("GET", "/v1/fine_tuning/jobs/([^/]+)"): FakeWire._show_tune,
    ("POST", "/v1/fine_tuning/jobs/([^/]+)/cancel"): FakeWire._cancel_tune,
    ("GET", "/v1/fine_tuning/jobs/([^/]+)/events"): FakeWire._list_events,
    ("GET", "/v1/fine_tuning/jobs/([^/]+)/checkpoints"): FakeWire._list_checkpoints,
}


def _page(request: Request, items: list[dict[str, Any]]) -> Reply:
    """Return a page of two items, so that every list has several pages."""
    ids = [item["id"] for item in items]
    begin = ids.index(request.first("after")) + 1 if request.first("after") else 0
    return Reply(body={"object": "list", "data": items[begin : begin + 2], "has_more": begin + 2 < len(items)})


def _refused(status: int, message: str, param: str | None = None) -> Reply:
    return Reply(
        status=status,
        body={"error": {"message": message, "type": "invalid_request_error", "code": None, "param": param}},
    )
