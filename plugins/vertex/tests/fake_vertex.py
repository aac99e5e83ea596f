"""Vertex AI and Cloud Storage on this machine. What arrives and what is answered is checked by the facts of Google's own
discovery document (discovery.json)."""

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path

from luthier import JobState
from luthier.testing.loopback import Reply
from luthier_vertex import Vertex

FACTS = json.loads((Path(__file__).parent / "discovery.json").read_text())
PARENT = "projects/p1/locations/us-central1"
FOLDER = "gs://my-bucket/luthier"
ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "sub/adapter_model.safetensors": bytes(range(256)) * 400}
TYPES = {"string": str, "boolean": bool, "number": (int, float), "integer": int, "object": dict, "array": list}


def wrong_fields(value, schema, version, *, asked, where="job"):
    """What the discovery document refuses of a value: unknown fields, other types, words that are none, and in what is
    `asked` for, fields that only the service writes."""
    known = FACTS[version]["schemas"].get(schema)
    if known is None:  # not among the facts that are kept
        return
    for name, inner in value.items():
        place, field = f"{where}.{name}", known.get(name)
        if field is None:
            yield f"{place} is not known"
        elif asked and field.get("readOnly"):
            yield f"{place} is the service's alone"
        elif "$ref" in field:
            yield from wrong_fields(inner, field["$ref"], version, asked=asked, where=place)
        elif (
            field.get("format") == "int64" and type(inner) is int
        ):  # JSON of Google takes both, and its SDK sends it so
            continue
        elif not isinstance(inner, TYPES[field["type"]]) or (isinstance(inner, bool) and field["type"] != "boolean"):
            yield f"{place} is no {field['type']}: {inner!r}"
        elif "enum" in field and inner not in field["enum"]:
            yield f"{place} is none of its words: {inner!r}"
        elif field.get("format") == "int64" and not re.fullmatch(r"-?\d+", inner):
            yield f"{place} is no whole number: {inner!r}"
        elif field["type"] == "array" and "$ref" in field.get("items", {}):
            for item in inner:
                yield from wrong_fields(item, field["items"]["$ref"], version, asked=asked, where=place)


class FakeVertex:
    """What the kit asks of a fake stands first."""

    model = "gemini-3.5-flash"
    create = ("POST", r"/tuningJobs$")
    upload = ("PUT", r"/session/")
    download = None
    signed = r"/session/"
    settings = {"num_train_epochs": 2.0, "adapter": {"name": "lora", "r": 8}}
    states = {
        f"JOB_STATE_{raw}": state
        for state, words in {
            JobState.PENDING: "QUEUED PENDING PAUSED", JobState.RUNNING: "RUNNING UPDATING CANCELLING",
            JobState.COMPLETED: "SUCCEEDED PARTIALLY_SUCCEEDED", JobState.FAILED: "FAILED EXPIRED",
            JobState.CANCELED: "CANCELLED",
        }.items()
        for raw in words.split()
    }  # fmt: skip

    def __init__(self):
        self.objects, self.sessions, self.tunes, self.url = {}, {}, {}, ""
        self.wrong, self.page, self.heeds_filter = [], 2, True

    def options(self, url, key):
        self.url = url
        return Vertex(base_url=url, storage_url=url, access_token=key, project="p1", location="us-central1",
                      gcs_folder=FOLDER)  # fmt: skip

    def jobs(self):
        return list(self.tunes)

    def set_state(self, id, raw):
        tune = self.tunes[id]
        tune["state"] = raw
        if raw == "JOB_STATE_RUNNING":
            tune["tuningJobState"] = "TUNING_JOB_STATE_WAITING_FOR_CAPACITY"
        if raw == "JOB_STATE_FAILED":
            tune["error"] = {"code": 3, "message": "line 3 is odd"}
        if raw == "JOB_STATE_SUCCEEDED":
            tune["endTime"] = now()
            tune["tuningDataStats"] = {"supervisedTuningDataStats": {"totalBillableTokenCount": "4321"}}
            points = [{"checkpointId": "1", "epoch": "1", "step": "5", "endpoint": f"{PARENT}/endpoints/1"}]
            tune["tunedModel"] = {"model": f"{PARENT}/models/77@1", "checkpoints": points}
            place = tune.get("outputUri", "").removeprefix("gs://")
            self.objects |= {f"{place}/{name}": content for name, content in ADAPTER.items() if place}

    def rows(self, id):
        spec = self.tunes[id].get("supervisedTuningSpec") or self.tunes[id]["preferenceOptimizationSpec"]
        return [
            json.loads(line) for line in self.objects[spec["trainingDatasetUri"].removeprefix("gs://")].splitlines()
        ]

    def answer(self, request):
        found = re.fullmatch(r"/session/(\d+)", request.path)
        if found and request.method == "PUT":
            return self.take_object(request, int(found[1]))
        if not request.headers.get("authorization", "").startswith("Bearer "):
            return refused(401, "UNAUTHENTICATED", "no token")
        for (method, pattern), act in ROUTES.items():
            found = re.fullmatch(pattern, request.path)
            if method == request.method and found:
                return act(self, request, *found.groups())
        return refused(404, "NOT_FOUND", f"no {request.method} {request.path}")

    def open_session(self, request, bucket):
        self.sessions[len(self.sessions)] = (f"{bucket}/{request.json['name']}", request.json["md5Hash"])
        return Reply(body={}, headers={"location": f"{self.url}/session/{len(self.sessions) - 1}?upload_id=x"})

    def take_object(self, request, number):
        place, told = self.sessions[number]
        if base64.b64encode(hashlib.md5(request.body).digest()).decode() != told:
            return refused(400, "INVALID_ARGUMENT", "the MD5 differs")
        self.objects[place] = request.body
        return Reply(body={"name": place})

    def show_object(self, request, bucket, name):
        content = self.objects.get(f"{bucket}/{name}")
        if content is None:
            return refused(404, "NOT_FOUND", "no such object")
        return (
            Reply(body=content)
            if request.first("alt") == "media"
            else Reply(body={"name": name, "size": str(len(content))})
        )

    def list_objects(self, request, bucket):
        names = [place.partition("/")[2] for place in sorted(self.objects)]
        names = [name for name in names if name.startswith(request.first("prefix"))]
        begin = int(request.first("pageToken") or 0)
        more = {"nextPageToken": str(begin + 1)} if begin + 1 < len(names) else {}
        return Reply(body={"items": [{"name": name, "size": "1"} for name in names[begin : begin + 1]], **more})

    def make_tune(self, request, version, parent):
        body = request.json
        problems = list(wrong_fields(body, "TuningJob", version, asked=True))
        spec = body.get("supervisedTuningSpec") or body.get("preferenceOptimizationSpec") or {}
        if problems or parent != PARENT or spec.get("trainingDatasetUri", "").removeprefix("gs://") not in self.objects:
            self.wrong += problems
            return refused(400, "INVALID_ARGUMENT", "; ".join(problems) or "parent or rows are wrong")
        name = f"{PARENT}/tuningJobs/{len(self.tunes) + 1}"
        self.tunes[name] = {
            **body,
            "name": name,
            "state": "JOB_STATE_PENDING",
            "createTime": now(),
            "updateTime": now(),
        }
        return self.told(self.tunes[name])

    def told(self, tune):
        self.wrong += wrong_fields(tune, "TuningJob", "v1beta1", asked=False)
        return Reply(body=tune)

    def show_tune(self, request, name):
        return self.told(self.tunes[name]) if name in self.tunes else refused(404, "NOT_FOUND", "no such job")

    def list_tunes(self, request, parent):
        wanted = re.fullmatch(r'labels\.luthier_job="(\w+)"', request.first("filter") or "")
        found = list(self.tunes.values())
        if wanted and self.heeds_filter:
            found = [tune for tune in found if tune["labels"]["luthier_job"] == wanted[1]]
        begin = int(request.first("pageToken") or 0)
        more = {"nextPageToken": str(begin + self.page)} if begin + self.page < len(found) else {}
        return Reply(body={"tuningJobs": found[begin : begin + self.page], **more})

    def cancel_tune(self, request, name):
        if self.states.get(self.tunes[name]["state"]) in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELED):
            return refused(400, "FAILED_PRECONDITION", "the job has ended")
        self.tunes[name]["state"] = "JOB_STATE_CANCELLING"
        return Reply(body={})


def fact_path(version, method):
    """A method's path as the discovery document has it, as a pattern."""
    path = FACTS[version]["methods"][method]["path"]
    return "/" + re.sub(r"\{\w+\}", "[^/:]+", path)


JOB = r"/v1beta1/(projects/[^/]+/locations/[^/]+/tuningJobs/[^/:]+)"
ROUTES = {
    ("POST", "/upload/storage/v1/b/([^/]+)/o"): FakeVertex.open_session,
    ("GET", "/storage/v1/b/([^/]+)/o"): FakeVertex.list_objects,
    ("GET", "/storage/v1/b/([^/]+)/o/(.+)"): FakeVertex.show_object,
    ("POST", "/(v1|v1beta1)/(.+)/tuningJobs"): FakeVertex.make_tune,
    ("GET", "/v1beta1/(.+)/tuningJobs"): FakeVertex.list_tunes,
    ("GET", JOB): FakeVertex.show_tune,
    ("POST", f"{JOB}:cancel"): FakeVertex.cancel_tune,
}


def now():
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def refused(status, word, message):
    return Reply(status=status, body={"error": {"code": status, "message": message, "status": word}})
