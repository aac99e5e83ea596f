"""OpenAI's fine-tuning as its SDK 2.54.0 meets it, on this machine."""

import json
import re
import time

from luthier import JobState
from luthier.testing.loopback import Reply
from luthier_openai import OpenAI

CSV = b"step,train_loss\n1,2.0\n2,1.0\n" * 5000


class FakeOpenAI:
    """What the kit asks of a fake stands first."""

    model = "gpt-4.1-mini-2025-04-14"
    create = ("POST", r"/v1/fine_tuning/jobs$")
    upload = ("POST", r"/v1/files$")
    download = None
    signed = None
    settings = {"num_train_epochs": 2.0, "seed": 7}
    states = {
        "validating_files": JobState.PENDING, "queued": JobState.PENDING, "paused": JobState.PENDING,
        "running": JobState.RUNNING, "succeeded": JobState.COMPLETED, "failed": JobState.FAILED,
        "cancelled": JobState.CANCELED,
    }  # fmt: skip

    def __init__(self):
        self.files, self.tunes, self.key_header = {}, {}, "authorization"
        self.heeds_filter = True

    def options(self, url, key):
        return OpenAI(base_url=f"{url}/v1", api_key=key)

    def jobs(self):
        return list(self.tunes)

    def set_state(self, id, raw):
        self.tunes[id]["status"] = raw
        if raw == "succeeded":
            self.tunes[id] |= {"fine_tuned_model": f"ft:{self.tunes[id]['model']}:me::{id}", "finished_at": int(time.time()),
                               "trained_tokens": 4321, "result_files": ["file-result"]}  # fmt: skip
        if raw == "failed":
            self.tunes[id]["error"] = {"code": "exceeded_quota", "message": "line 3 is odd", "param": "training_file"}

    def rows(self, id):
        return [json.loads(line) for line in self.files[self.tunes[id]["training_file"]]["content"].splitlines()]

    def answer(self, request):
        if not request.headers.get(self.key_header):
            return refused(401, "Missing API key")
        for (method, pattern), act in ROUTES.items():
            found = re.fullmatch(pattern, request.path)
            if method == request.method and found:
                return act(self, request, *found.groups())
        return refused(404, f"no {request.method} {request.path}")

    def take_file(self, request):
        form = request.form()
        if form.get("purpose") != b"fine-tune" or "file" not in form:
            return refused(400, "purpose or file is missing")
        id = f"file-{len(self.files) + 1}"
        self.files[id] = {"content": form["file"], "filename": form["file.filename"].decode()}
        return self.show_file(request, id)

    def show_file(self, request, id):
        if id not in self.files:
            return refused(404, "no such file")
        file = self.files[id]
        return Reply(body={"id": id, "object": "file", "bytes": len(file["content"]), "created_at": int(time.time()),
                           "filename": file["filename"], "purpose": "fine-tune", "status": "processed"})  # fmt: skip

    def send_file(self, request, id):
        return Reply(body=CSV) if id == "file-result" else refused(404, "no such file")

    def make_tune(self, request):
        body = request.json
        if body.get("training_file") not in self.files or not body.get("model"):
            return refused(400, "training_file or model is missing", "training_file")
        id = f"ftjob-{len(self.tunes) + 1}"
        method = body.get("method") or {"type": "supervised"}
        self.tunes[id] = {
            "id": id, "object": "fine_tuning.job", "status": "validating_files", "created_at": int(time.time()),
            "model": body["model"], "training_file": body["training_file"], "validation_file": body.get("validation_file"),
            "metadata": body.get("metadata"), "method": method, "seed": body.get("seed") or 1, "error": {},
            "hyperparameters": {"n_epochs": "auto"}, "fine_tuned_model": None, "finished_at": None, "trained_tokens": None,
            "organization_id": "org", "result_files": [], "integrations": [],
        }  # fmt: skip
        return Reply(body=self.tunes[id])

    def show_tune(self, request, id):
        return Reply(body=self.tunes[id]) if id in self.tunes else refused(404, "no such job")

    def list_tunes(self, request):
        wanted = {k[9:-1]: v[0] for k, v in request.query.items() if k.startswith("metadata[")}
        newest = list(self.tunes.values())[::-1]
        if self.heeds_filter:
            newest = [t for t in newest if all((t["metadata"] or {}).get(k) == v for k, v in wanted.items())]
        return page(request, newest)

    def cancel_tune(self, request, id):
        if self.tunes[id]["status"] in ("succeeded", "failed", "cancelled"):
            return refused(400, "the job has ended")
        self.tunes[id]["status"] = "cancelled"
        return Reply(body=self.tunes[id])

    def list_events(self, request, id):
        steps = [
            {"id": f"ftevent-{s}", "object": "fine_tuning.job.event", "created_at": 1795848000 + s, "level": "info",
             "message": f"Step {s}/4", "type": "metrics", "data": {"step": s, "total_steps": 4, "train_loss": 4.0 / s}}
            for s in range(1, 5)
        ]  # fmt: skip
        first = {"id": "ftevent-0", "object": "fine_tuning.job.event", "created_at": 1795848000, "level": "warn",
                 "message": "Created", "type": "message", "data": None}  # fmt: skip
        return page(request, [*steps[::-1], first])

    def list_checkpoints(self, request, id):
        return page(request, [{"id": "ftckpt_1", "object": "fine_tuning.job.checkpoint", "created_at": 1, "step_number": 2,
                               "fine_tuned_model_checkpoint": "ft:m:ckpt-2", "fine_tuning_job_id": id,
                               "metrics": {"step": 2, "train_loss": 2.0}}])  # fmt: skip

    def list_models(self, request):
        return Reply(
            body={"object": "list", "data": [{"id": self.model, "object": "model", "created": 1, "owned_by": "x"}]}
        )


ROUTES = {
    ("GET", "/v1/models"): FakeOpenAI.list_models,
    ("POST", "/v1/files"): FakeOpenAI.take_file,
    ("GET", "/v1/files/([^/]+)"): FakeOpenAI.show_file,
    ("GET", "/v1/files/([^/]+)/content"): FakeOpenAI.send_file,
    ("POST", "/v1/fine_tuning/jobs"): FakeOpenAI.make_tune,
    ("GET", "/v1/fine_tuning/jobs"): FakeOpenAI.list_tunes,
    ("GET", "/v1/fine_tuning/jobs/([^/]+)"): FakeOpenAI.show_tune,
    ("POST", "/v1/fine_tuning/jobs/([^/]+)/cancel"): FakeOpenAI.cancel_tune,
    ("GET", "/v1/fine_tuning/jobs/([^/]+)/events"): FakeOpenAI.list_events,
    ("GET", "/v1/fine_tuning/jobs/([^/]+)/checkpoints"): FakeOpenAI.list_checkpoints,
}


def page(request, items):
    """Two items a page, so that every list has several."""
    ids = [item["id"] for item in items]
    begin = ids.index(request.first("after")) + 1 if request.first("after") else 0
    return Reply(body={"object": "list", "data": items[begin : begin + 2], "has_more": begin + 2 < len(items)})


def refused(status, message, param=None):
    return Reply(
        status=status,
        body={"error": {"message": message, "type": "invalid_request_error", "code": None, "param": param}},
    )
