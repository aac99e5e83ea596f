"""The API server of SkyPilot, as far as managed jobs need it; bodies and tasks are held to the fields of 0.14.1."""

import io
import json
import tarfile

import yaml
from luthier import JobState, join_parcel
from luthier.testing import Reply
from luthier_skypilot import Skypilot
from payload_facts import BODIES, TASK, find_faults

PLAN = """\x1b[1mEstimated cost: \x1b[0m$2.9 / hour

Considered resources (1 node):
 INFRA          INSTANCE    vCPUs   Mem(GB)   GPUS     COST ($)   CHOSEN
 AWS (us-east)  p5.4xlarge  16      256       H100:1   \x1b[1m2.93\x1b[0m       \x1b[1m   ✔\x1b[0m
 GCP (us-west)  a3-high-1g  26      234       H100:1   5.38
"""


class FakeSkypilot:
    model = "demo"
    create = ("POST", r"/jobs/launch$")
    upload = None
    download = None
    signed = None
    reads = r"/jobs/queue/v2$|/jobs/logs$|/optimize$"
    settings = {"max_steps": 4}
    states = {
        "PENDING": JobState.PENDING, "SUBMITTED": JobState.PENDING, "STARTING": JobState.PENDING,
        "RUNNING": JobState.RUNNING, "RECOVERING": JobState.RUNNING, "WINDING_DOWN": JobState.RUNNING,
        "CANCELLING": JobState.RUNNING, "SUCCEEDED": JobState.COMPLETED, "CANCELLED": JobState.CANCELED,
        "FAILED": JobState.FAILED, "FAILED_SETUP": JobState.FAILED, "FAILED_PRECHECKS": JobState.FAILED,
        "FAILED_NO_RESOURCE": JobState.FAILED, "FAILED_CONTROLLER": JobState.FAILED,
    }  # fmt: skip

    def __init__(self):
        self.queue, self.tasks, self.requests = {}, {}, {}
        self.refusal, self.slow, self.plan = None, False, PLAN
        self.output = "".join(["setting up\n", *map(self.told_step, range(1, 5))])

    @staticmethod
    def told_step(step):
        line = json.dumps({"step": step, "loss": 4.0 / step}) + "\n"
        told = f"luthier-told: {json.dumps({'at': 1795867202.0 + step, 'line': line})}"
        return f"\x1b[36m(luthier-x, pid=7)\x1b[0m {told}\n"

    def options(self, url, key):
        return Skypilot(address=url, token=key, bucket="s3://results")

    def jobs(self):
        return list(self.queue)

    def rows(self, id):
        with tarfile.open(fileobj=io.BytesIO(join_parcel(self.tasks[id]["envs"]))) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        return [json.loads(line) for name in files if name.startswith("data/") for line in files[name].splitlines()]

    def set_state(self, id, raw):
        self.queue[id] |= {"status": raw, "failure_reason": "the command failed" if raw.startswith("FAILED") else None}

    def answer(self, request):
        if not request.headers.get("authorization", "").startswith("Bearer "):
            return Reply(status=401, body={"detail": "Authentication required"})
        act = ROUTES.get((request.method, request.path))
        if act is None:
            return Reply(status=404, body={"detail": "Not Found"})
        if request.method == "POST":
            faults = list(find_faults(request.json, BODIES[request.path]))
            if faults:
                return Reply(status=422, body={"detail": faults})
        return act(self, request)

    def _begin(self, request, name, value, error=None):
        """Keep a request with its result, and name it in the answer's header."""
        id = f"req-{len(self.requests) + 1}"
        self.requests[id] = {
            "request_id": id, "name": f"sky.{name}", "entrypoint": "gASV", "request_body": "gASV",
            "status": "FAILED" if error else "SUCCEEDED", "created_at": 1.0, "user_id": "0a1b2c3d",
            "return_value": json.dumps(value), "error": json.dumps(error), "pid": 1, "schedule_type": "short",
        }  # fmt: skip
        return Reply(body=None, headers={"X-Skypilot-Request-ID": id})

    def _launch(self, request):
        if self.refusal is not None:
            return self._begin(request, "jobs.launch", None, self.refusal)
        named, task = yaml.safe_load_all(request.json["task"])
        faults = list(find_faults(task, TASK))
        if faults or named != {"name": request.json["name"]}:
            error = {"object": "gASV", "type": "ValueError", "message": f"Invalid task YAML: {faults}"}
            return self._begin(request, "jobs.launch", None, error)
        id = str(len(self.queue) + 1)
        self.tasks[id] = task
        self.queue[id] = {"job_id": int(id), "task_id": 0, "job_name": request.json["name"], "task_name": task["name"],
                          "status": "PENDING", "submitted_at": 1795867200.0 + int(id), "end_at": None}  # fmt: skip
        return self._begin(request, "jobs.launch", {"job_id": [int(id)], "handle": "gASV"})

    def _show_queue(self, request):
        body = request.json
        found = [
            item for id, item in self.queue.items()
            if (body.get("name_match") or "") in item["job_name"] and int(id) in (body.get("job_ids") or [int(id)])
        ]  # fmt: skip
        page, limit = body.get("page") or 1, body.get("limit") or 99
        newest = sorted(found, key=lambda item: item["job_id"], reverse=body.get("sort_order") == "desc")
        kept = {*body["fields"], "job_id", "task_id", "status"}
        shown = [{k: v for k, v in item.items() if k in kept} for item in newest[(page - 1) * limit : page * limit]]
        if not self.queue:
            error = {"object": "gASV", "type": "ClusterNotUpError", "message": "No in-progress managed jobs."}
            return self._begin(request, "jobs.queue_v2", None, error)
        return self._begin(request, "jobs.queue_v2", {"jobs": shown, "total": len(found), "status_counts": {}})

    def _cancel(self, request):
        for id in request.json["job_ids"]:
            if self.states.get(self.queue[str(id)]["status"], JobState.PENDING).is_final is False:
                self.queue[str(id)]["status"] = "CANCELLING"
        return self._begin(request, "jobs.cancel", None)

    def _show_result(self, request):
        item = self.requests.get(request.first("request_id"))
        if item is None:
            return Reply(status=404, body={"detail": "Request not found"})
        return Reply(status=500, body={"detail": item}) if item["status"] == "FAILED" else Reply(body=item)

    def _show_active(self, request):
        return Reply(body=[item for item in self.requests.values() if item["status"] == "RUNNING"])

    def _optimize(self, request):
        (error,) = [self.refusal] if self.refusal else [None]
        return self._begin(request, "optimize", None, error)


ROUTES = {
    ("GET", "/api/health"): lambda fake, request: Reply(
        body={"status": "healthy", "api_version": "62", "version": "0.14.1"}
    ),
    ("GET", "/api/get"): FakeSkypilot._show_result,
    ("GET", "/api/status"): FakeSkypilot._show_active,
    ("GET", "/api/stream"): lambda fake, request: Reply(body=fake.plan.encode()),
    ("POST", "/optimize"): FakeSkypilot._optimize,
    ("POST", "/jobs/launch"): FakeSkypilot._launch,
    ("POST", "/jobs/queue/v2"): FakeSkypilot._show_queue,
    ("POST", "/jobs/cancel"): FakeSkypilot._cancel,
    ("POST", "/jobs/logs"): lambda fake, request: Reply(body=fake.output.encode()),
}
