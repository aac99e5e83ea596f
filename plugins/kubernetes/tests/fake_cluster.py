"""The API of a Kubernetes cluster with Kubeflow's trainer, as far as a job needs it, strict on fields."""

import io
import json
import re
import tarfile
from datetime import UTC, datetime, timedelta

from luthier import JobState, join_parcel
from luthier.testing import Reply
from luthier_kubernetes import Kubernetes
from train_job_schema import TRAIN_JOB, find_faults

GROUP = "/apis/trainer.kubeflow.org/v1alpha1"
BEGUN = datetime(2026, 11, 28, 12, tzinfo=UTC)
WORDS = {"Complete": "JobsCompleted", "Failed": "JobsFailed", "Suspended": "Suspended"}


def moment(seconds):
    return (BEGUN + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


class FakeCluster:
    model = "demo"
    create = ("POST", r"/trainjobs$")
    upload = None
    download = None
    signed = None
    settings = {"max_steps": 4}
    states = {
        "Created": JobState.PENDING, "Suspended": JobState.PENDING, "Running": JobState.RUNNING,
        "Complete": JobState.COMPLETED, "Failed": JobState.FAILED, "Canceled": JobState.CANCELED,
        "Stopping": JobState.RUNNING,
    }  # fmt: skip

    def __init__(self):
        self.objects = {}
        self.output = [
            (1, "Collecting luthier"),
            (2, 'luthier-told: {"at": 1795867202.0, "total_steps": 4}'),
            *((2 + s, self.told_step(s)) for s in range(1, 5)),
        ]

    @staticmethod
    def told_step(step):
        line = json.dumps({"step": step, "loss": 4.0 / step}) + "\n"
        return f"luthier-told: {json.dumps({'at': 1795867202.0 + step, 'line': line})}"

    def options(self, url, key):
        return Kubernetes(server=url, token=key, namespace="team", claim="training")

    def jobs(self):
        return list(self.objects)

    def parcel(self, id):
        """The files that came with a job, by their names."""
        variables = {item["name"]: item["value"] for item in self.objects[id]["spec"]["trainer"]["env"]}
        with tarfile.open(fileobj=io.BytesIO(join_parcel(variables))) as tar:
            return {member.name: tar.extractfile(member).read() for member in tar}

    def rows(self, id):
        files = self.parcel(id)
        return [json.loads(line) for name in files if name.startswith("data/") for line in files[name].splitlines()]

    def set_state(self, id, raw):
        item = self.objects[id]
        active, ready = int(raw in ("Running", "Stopping")), int(raw == "Running")
        child = {"name": "node", "active": active, "ready": ready, "failed": 0, "succeeded": 0, "suspended": 0}
        item["status"] = {"jobsStatus": [child]}
        if raw in ("Canceled", "Stopping"):
            item["metadata"]["annotations"] = {"luthier-canceled": "true"}
            item["spec"]["suspend"] = True
        elif raw not in ("Created", "Running"):
            item["status"]["conditions"] = [
                {"type": raw, "status": "True", "reason": WORDS.get(raw, "Other"), "message": "jobset ended",
                 "lastTransitionTime": moment(99)}
            ]  # fmt: skip

    def answer(self, request):
        if not request.headers.get("authorization", "").startswith("Bearer "):
            return refused(401, "Unauthorized", "Unauthorized")
        for (method, pattern), act in ROUTES.items():
            match = re.fullmatch(pattern, request.path)
            if method == request.method and match:
                return act(self, request, *match.groups())
        return refused(404, "the server could not find the requested resource", "NotFound")

    def _make(self, request):
        item = request.json
        name = item["metadata"]["name"]
        if name in self.objects:
            return refused(409, f'trainjobs "{name}" already exists', "AlreadyExists")
        faults = list(find_faults(item, TRAIN_JOB))
        if faults or request.first("fieldValidation") != "Strict":
            return refused(400, f"strict decoding error: {faults}", "BadRequest")
        item["metadata"] |= {"creationTimestamp": moment(len(self.objects)), "uid": f"uid-{name}", "namespace": "team"}
        self.objects[name] = item
        return Reply(status=201, body=item)

    def _show(self, request, name):
        return (
            Reply(body=self.objects[name]) if name in self.objects else refused(404, f'"{name}" not found', "NotFound")
        )

    def _change(self, request, name):
        if request.headers["content-type"] != "application/merge-patch+json":
            return refused(415, "the body of the request was in an unknown format", "UnsupportedMediaType")
        item = self.objects[name]
        for part, values in request.json.items():
            for key, value in values.items():
                item[part][key] = {**item[part].get(key, {}), **value} if isinstance(value, dict) else value
        return Reply(body=item)

    def _list(self, request):
        if request.first("labelSelector") != "luthier-job":
            return refused(400, "another selector was awaited", "BadRequest")
        return page(request, list(self.objects.values()))

    def _list_pods(self, request):
        selected = dict(word.split("=") for word in request.first("labelSelector").split(","))
        name = selected["jobset.sigs.k8s.io/jobset-name"]
        labels = {"jobset.sigs.k8s.io/replicatedjob-name": "node"}
        pods = [
            {"metadata": {"name": f"{name}-node-0-{i}-x", "creationTimestamp": moment(1),
                          "labels": {**labels, "batch.kubernetes.io/job-completion-index": str(i)}},
             "status": {"phase": "Running"}}
            for i in range(2)
        ]  # fmt: skip
        return page(request, pods if name in self.objects else [])

    def _show_log(self, request, name):
        if (request.first("container"), request.first("timestamps")) != ("node", "true") or "-node-0-0-" not in name:
            return refused(400, "another container was awaited", "BadRequest")
        since = request.first("sinceTime") or ""
        lines = [f"{moment(at)} {text}\n" for at, text in self.output if moment(at) >= since]
        return Reply(body="".join(lines).encode())

    def _show_group(self, request):
        return Reply(
            body={"kind": "APIResourceList", "resources": [{"name": "trainjobs"}, {"name": "trainjobs/status"}]}
        )

    def _show_runtime(self, request, name):
        return Reply(body={"kind": "ClusterTrainingRuntime"}) if name == "torch-distributed" else refused(
            404, f'clustertrainingruntimes "{name}" not found', "NotFound")  # fmt: skip


JOBS = f"{GROUP}/namespaces/team/trainjobs"
PODS = "/api/v1/namespaces/team/pods"
ROUTES = {
    ("POST", JOBS): FakeCluster._make,
    ("GET", JOBS): FakeCluster._list,
    ("GET", f"{JOBS}/([^/]+)"): FakeCluster._show,
    ("PATCH", f"{JOBS}/([^/]+)"): FakeCluster._change,
    ("GET", PODS): FakeCluster._list_pods,
    ("GET", f"{PODS}/([^/]+)/log"): FakeCluster._show_log,
    ("GET", GROUP): FakeCluster._show_group,
    ("GET", f"{GROUP}/clustertrainingruntimes/([^/]+)"): FakeCluster._show_runtime,
}


def page(request, items):
    """Two items a page, so that every list has several."""
    begin = int(request.first("continue") or 0)
    more = {"continue": str(begin + 2)} if begin + 2 < len(items) else {}
    return Reply(body={"metadata": more, "items": items[begin : begin + 2]})


def refused(status, message, reason):
    body = {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": status}
    return Reply(status=status, body=body)
