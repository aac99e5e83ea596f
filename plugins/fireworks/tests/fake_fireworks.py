"""Fireworks AI as its SDK 1.2.28 meets it, on this machine: datasets, both kinds of jobs, metrics, signed links."""

import json
import re
from datetime import UTC, datetime

from luthier import JobState
from luthier.testing.loopback import Reply
from luthier_fireworks import Fireworks

ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA", "r": 8}',
    "adapter_model.safetensors": bytes(range(256)) * 400,
}
METRICS = "".join(json.dumps({"step": s, "train/loss": 4.0 / s, "lr": 1e-5}) + "\n" for s in range(1, 5))


class FakeFireworks:
    """What the kit asks of a fake stands first."""

    model = "accounts/fireworks/models/llama-v3p1-8b-instruct"
    create = ("POST", r"/supervisedFineTuningJobs$")
    upload = ("POST", r":upload$")
    download = ("GET", r"/storage/adapter")
    signed = r"/storage/"
    settings = {"num_train_epochs": 2.0, "learning_rate": 1e-5, "adapter": {"name": "lora", "r": 8}}
    states = {
        f"JOB_STATE_{raw}": state
        for state, words in {
            JobState.PENDING: "CREATING PENDING VALIDATING CREATING_INPUT_DATASET RE_QUEUEING PAUSED IDLE",
            JobState.RUNNING: "RUNNING WRITING_RESULTS CANCELLING",
            JobState.COMPLETED: "COMPLETED EARLY_STOPPED",
            JobState.FAILED: "FAILED EXPIRED",
            JobState.CANCELED: "CANCELLED DELETING DELETING_CLEANING_UP",
        }.items()
        for raw in words.split()
    }

    def __init__(self):
        self.datasets, self.tunes, self.url, self.page = {}, {}, "", 2

    def options(self, url, key):
        self.url = url
        return Fireworks(base_url=url, api_key=key, account="me")

    def jobs(self):
        return list(self.tunes)

    def set_state(self, id, raw):
        self.tunes[id]["state"] = raw
        if raw == "JOB_STATE_FAILED":
            self.tunes[id]["status"] = {"code": "INVALID_ARGUMENT", "message": "line 3 is odd"}

    def rows(self, id):
        return [json.loads(line) for line in self.datasets[self.tunes[id]["dataset"]]["content"].splitlines()]

    def answer(self, request):
        if request.path.startswith("/storage/"):
            return self.store(request)
        if not request.headers.get("authorization", "").startswith("Bearer "):
            return refused(401, "UNAUTHENTICATED", "missing key")
        for (method, pattern), act in ROUTES.items():
            found = re.fullmatch(pattern, request.path.removeprefix("/v1/accounts/me"))
            if method == request.method and found:
                return act(self, request, *found.groups())
        return refused(404, "NOT_FOUND", f"no {request.method} {request.path}")

    def show_account(self, request):
        return Reply(body={"name": "accounts/me", "state": "READY"})

    def make_dataset(self, request):
        id, dataset = request.json["datasetId"], request.json["dataset"]
        name = f"accounts/me/datasets/{id}"
        if not isinstance(dataset.get("exampleCount"), str) or "userUploaded" not in dataset:
            return refused(400, "INVALID_ARGUMENT", "exampleCount is a string, userUploaded an object")
        if name in self.datasets:
            return refused(409, "ALREADY_EXISTS", "a dataset of this id exists")
        self.datasets[name] = {**dataset, "name": name, "state": "UPLOADING", "content": None}
        return self.show_dataset(request, id)

    def show_dataset(self, request, id):
        found = self.datasets.get(f"accounts/me/datasets/{id}")
        if found is None:
            return refused(404, "NOT_FOUND", "no such dataset")
        return Reply(body={k: v for k, v in found.items() if k != "content"})

    def take_rows(self, request, id):
        return self.fill(f"accounts/me/datasets/{id}", request.form()["file"])

    def fill(self, name, content):
        self.datasets[name] |= {"content": content, "state": "READY"}
        return Reply(body={})

    def give_upload_link(self, request, id):
        (name,) = request.json["filenameToSize"]
        return Reply(body={"filenameToSignedUrls": {name: f"{self.url}/storage/rows/{id}?X-Goog-Signature=ok"}})

    def check_upload(self, request, id):
        return Reply(body={})

    def store(self, request):
        if request.first("X-Goog-Signature") != "ok":
            return Reply(status=403, body=b"expired")
        kind, name = request.path.split("/")[2:]
        if kind == "rows":
            return self.fill(f"accounts/me/datasets/{name}", request.body)
        content = METRICS.encode() if kind == "metrics" else ADAPTER[name]
        begin = int((request.headers.get("range") or "bytes=0-")[6:].split("-")[0])
        headers = {"etag": '"1"'}
        if begin:
            headers["content-range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        return Reply(body=content[begin:], status=206 if begin else 200, headers=headers)

    def make_tune(self, request, kind):
        body, id = request.json, request.first("supervisedFineTuningJobId" if "super" in kind else "dpoJobId")
        name = f"accounts/me/{kind}/{id}"
        config = body if "super" in kind else body.get("trainingConfig") or {}
        if self.datasets.get(body.get("dataset"), {}).get("state") != "READY" or not config.get("baseModel"):
            return refused(400, "INVALID_ARGUMENT", "dataset or baseModel is missing")
        if name in self.tunes:
            return refused(409, "ALREADY_EXISTS", "a job of this id exists")
        extra = {"metricsFileSignedUrl": self.link("metrics", "m")} if "super" in kind else {}
        self.tunes[name] = {**body, **extra, "name": name, "state": "JOB_STATE_CREATING", "status": {"code": "OK"},
                            "createTime": datetime.now(UTC).isoformat(), "jobProgress": {"percent": 40, "epoch": 1},
                            "estimatedCost": {"currencyCode": "USD", "units": "2", "nanos": 500_000_000}}  # fmt: skip
        return Reply(body=self.tunes[name])

    def link(self, kind, name):
        return f"{self.url}/storage/{kind}/{name}?X-Goog-Signature=ok"

    def show_tune(self, request, kind, id):
        name = f"accounts/me/{kind}/{id}"
        return Reply(body=self.tunes[name]) if name in self.tunes else refused(404, "NOT_FOUND", "no such job")

    def list_tunes(self, request, kind):
        found = [tune for name, tune in self.tunes.items() if f"/{kind}/" in name]
        begin = int(request.first("pageToken") or 0)
        more = {"nextPageToken": str(begin + self.page)} if begin + self.page < len(found) else {"nextPageToken": ""}
        return Reply(body={kind: found[begin : begin + self.page], "totalSize": len(found), **more})

    def cancel_tune(self, request, kind, id):
        tune = self.tunes[f"accounts/me/{kind}/{id}"]
        if self.states.get(tune["state"]) in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELED):
            return refused(400, "FAILED_PRECONDITION", "the job has ended")
        tune["state"] = "JOB_STATE_CANCELLING"
        return Reply(body={})

    def give_metrics_link(self, request, id):
        return Reply(body={"signedUrl": self.link("metrics", "m")})

    def give_model_links(self, request, id):
        return Reply(body={"filenameToSignedUrls": {name: self.link("adapter", name) for name in ADAPTER}})


JOBS = "/(supervisedFineTuningJobs|dpoJobs)"
ROUTES = {
    ("GET", ""): FakeFireworks.show_account,
    ("POST", "/datasets"): FakeFireworks.make_dataset,
    ("GET", "/datasets/([^/:]+)"): FakeFireworks.show_dataset,
    ("POST", "/datasets/([^/:]+):upload"): FakeFireworks.take_rows,
    ("POST", "/datasets/([^/:]+):getUploadEndpoint"): FakeFireworks.give_upload_link,
    ("POST", "/datasets/([^/:]+):validateUpload"): FakeFireworks.check_upload,
    ("POST", JOBS): FakeFireworks.make_tune,
    ("GET", JOBS): FakeFireworks.list_tunes,
    ("GET", f"{JOBS}/([^/:]+)"): FakeFireworks.show_tune,
    ("POST", f"{JOBS}/([^/:]+):cancel"): FakeFireworks.cancel_tune,
    ("GET", "/dpoJobs/([^/:]+):getMetricsFileEndpoint"): FakeFireworks.give_metrics_link,
    ("GET", "/models/([^/:]+):getDownloadEndpoint"): FakeFireworks.give_model_links,
}


def refused(status, code, message):
    return Reply(status=status, body={"code": 9, "status": code, "message": message, "details": []})
