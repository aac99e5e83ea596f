"""Ray's Jobs API as 2.60 has it, errors of plain text and the 500 of a name that exists included."""

import base64
import io
import json
import re
import tarfile
import zipfile

from luthier import JobState
from luthier.testing import Reply
from luthier_ray import Ray

FIELDS = {"entrypoint", "submission_id", "runtime_env", "metadata", "entrypoint_num_cpus", "entrypoint_num_gpus"}


class FakeRay:
    model = "demo"
    create = ("POST", r"/api/jobs/$")
    upload = None
    download = ("GET", r"/api/jobs/luthier-give-[^/]+/logs$")
    signed = None
    settings = {"max_steps": 4}
    states = {
        "PENDING": JobState.PENDING, "RUNNING": JobState.RUNNING, "SUCCEEDED": JobState.COMPLETED,
        "FAILED": JobState.FAILED, "STOPPED": JobState.CANCELED,
    }  # fmt: skip

    def __init__(self):
        self.packages, self.submissions, self.output = {}, {}, {}
        self.given, self.give_state = given_archive(), "SUCCEEDED"

    @staticmethod
    def told_step(step):
        line = json.dumps({"step": step, "loss": 4.0 / step}) + "\n"
        return f"luthier-told: {json.dumps({'at': 1795867202.0 + step, 'line': line})}\n"

    def options(self, url, key):
        return Ray(address=url, token=key)

    def jobs(self):
        return [name for name in self.submissions if not name.startswith("luthier-give-")]

    def rows(self, id):
        package = self.submissions[id]["runtime_env"]["working_dir"].removeprefix("gcs://")
        with zipfile.ZipFile(io.BytesIO(self.packages[package])) as archive:
            content = archive.read("parcel.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            lines = [tar.extractfile(m).read().splitlines() for m in tar if m.name.startswith("data/")]
        return [json.loads(line) for some in lines for line in some]

    def set_state(self, id, raw):
        self.submissions[id] |= {"status": raw, "end_time": 1795867300000 if raw in self.states else None}
        if raw == "FAILED":
            self.submissions[id]["message"] = "Job entrypoint command failed with exit code 3"
        if raw == "SUCCEEDED":
            results = {"adapter": f"/tmp/luthier-jobs/{id}/run/adapter"}
            told = {"at": 1795867300.0, "code": 0, "reason": None, "results": results}
            self.output[id] += f"luthier-told: {json.dumps(told)}\n"

    def answer(self, request):
        if not request.headers.get("authorization", "").startswith("Bearer "):
            return plain(401, "Unauthorized: Missing authentication token")
        for (method, pattern), act in ROUTES.items():
            match = re.fullmatch(pattern, request.path)
            if method == request.method and match:
                return act(self, request, *match.groups())
        return plain(404, "404: Not Found")

    def _take_package(self, request, name):
        zipfile.ZipFile(io.BytesIO(request.body)).testzip()
        self.packages[name] = request.body
        return Reply(body=b"")

    def _make(self, request):
        body = request.json
        name = body["submission_id"]
        package = body["runtime_env"].get("working_dir", "").removeprefix("gcs://")
        if set(body) - FIELDS or (package and package not in self.packages):
            return plain(400, "TypeError: JobSubmitRequest got an unexpected keyword argument")
        if name in self.submissions:
            return plain(500, f"ValueError: Job with submission_id {name} already exists.")
        begun = 1795867200000 + len(self.submissions)
        self.submissions[name] = {**body, "type": "SUBMISSION", "status": "PENDING", "start_time": begun, "end_time": None,
                                  "message": "Job has not started yet."}  # fmt: skip
        self.output[name] = "".join(map(self.told_step, range(1, 5)))
        if name.startswith("luthier-give-"):
            self.submissions[name]["status"] = self.give_state
            self.output[name] = f"luthier-told: {json.dumps({'at': 1.0, 'archive': self.given})}\n"
        return Reply(body={"job_id": name, "submission_id": name})

    def _show(self, request, name):
        return (
            Reply(body=self.submissions[name]) if name in self.submissions else plain(404, f"Job {name} does not exist")
        )

    def _list(self, request):
        return Reply(body=[*self.submissions.values(), {"type": "DRIVER", "job_id": "01", "status": "RUNNING"}])

    def _stop(self, request, name):
        running = self.submissions[name]["status"] in ("PENDING", "RUNNING")
        if running:
            self.submissions[name]["status"] = "STOPPED"
        return Reply(body={"stopped": running})

    def _delete(self, request, name):
        if self.submissions.get(name, {}).get("status") in ("PENDING", "RUNNING"):
            return plain(500, f"RuntimeError: Attempted to delete job '{name}', but it is in a non-terminal state")
        return Reply(body={"deleted": self.submissions.pop(name, None) is not None})

    def _show_logs(self, request, name):
        return Reply(body={"logs": self.output[name]}) if name in self.submissions else plain(404, "no such job")

    def _show_version(self, request):
        return Reply(body={"version": "4", "ray_version": "2.60.0", "session_name": "s"})


def given_archive():
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        member = tarfile.TarInfo("adapter_model.safetensors")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    return base64.b64encode(made.getvalue()).decode()


def plain(status, text):
    return Reply(status=status, body=text.encode(), headers={"content-type": "text/plain"})


ROUTES = {
    ("PUT", "/api/packages/gcs/(_ray_pkg_[0-9a-f]+.zip)"): FakeRay._take_package,
    ("POST", "/api/jobs/"): FakeRay._make,
    ("GET", "/api/jobs/"): FakeRay._list,
    ("GET", "/api/jobs/([^/]+)"): FakeRay._show,
    ("GET", "/api/jobs/([^/]+)/logs"): FakeRay._show_logs,
    ("POST", "/api/jobs/([^/]+)/stop"): FakeRay._stop,
    ("DELETE", "/api/jobs/([^/]+)"): FakeRay._delete,
    ("GET", "/api/version"): FakeRay._show_version,
}
