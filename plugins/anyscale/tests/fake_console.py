"""Anyscale's console, as far as its SDK 0.26.112 needs it for jobs; the SDK's own models judge every answer."""

import io
import json
import re
import tarfile
import zipfile
from datetime import UTC, datetime, timedelta

from luthier import JobState
from luthier.testing import Reply
from luthier_anyscale import AnyscaleJobs

BEGUN = datetime(2026, 11, 29, 12, tzinfo=UTC)
RAW = {"STARTING": "PENDING", "RUNNING": "RUNNING", "SUCCEEDED": "SUCCESS", "FAILED": "OUT_OF_RETRIES",
       "TERMINATED": "TERMINATED"}  # fmt: skip
CONFIG = {"cloud_id": "cld_1", "head_node_type": {"name": "head", "instance_type": "m5.xlarge"}}
JOB = "/api/v2/decorated_ha_jobs"


class FakeConsole:
    model = "demo"
    create = ("POST", f"{JOB}/create$")
    upload = None
    download = None
    signed = r"^/bucket/"
    reads = r"/job_runs/search$"
    unknown = "UNKNOWN"
    settings = {"max_steps": 4}
    states = {
        "STARTING": JobState.PENDING, "RUNNING": JobState.RUNNING, "SUCCEEDED": JobState.COMPLETED,
        "FAILED": JobState.FAILED, "TERMINATED": JobState.CANCELED,
    }  # fmt: skip

    def __init__(self):
        self.made, self.packages, self.links = {}, {}, 0
        self.output = "".join([*map(self.told_step, range(1, 5)), "a line of the program's own\n"])

    @staticmethod
    def told_step(step):
        line = json.dumps({"step": step, "loss": 4.0 / step}) + "\n"
        return f"luthier-told: {json.dumps({'at': 1795867202.0 + step, 'line': line})}\n"

    def options(self, url, key):
        self.url = url
        return AnyscaleJobs(address=url, api_key=key)

    def jobs(self):
        return list(self.made)

    def rows(self, id):
        """The rows in the parcel in the working folder that the job names."""
        package = self.packages[self.made[id]["config"]["runtime_env"]["working_dir"].rpartition("/")[2]]
        with zipfile.ZipFile(io.BytesIO(package)) as folder:
            (name,) = [name for name in folder.namelist() if name.endswith("parcel.tar.gz")]
            content = folder.read(name)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        return [json.loads(line) for name in files if name.startswith("data/") for line in files[name].splitlines()]

    def set_state(self, id, raw):
        """Set a state, by the SDK's word for it or by one of the console's own."""
        self.made[id]["state"]["current_state"] = RAW.get(raw, raw)

    def answer(self, request):
        if not request.path.startswith("/bucket/") and "cli_token=a_" not in request.headers.get("cookie", ""):
            return refused(401, "Unauthorized")
        for (method, pattern), act in ROUTES.items():
            match = re.fullmatch(pattern, request.path)
            if method == request.method and match:
                return act(self, request, *match.groups())
        return refused(404, f"no {request.method} {request.path}")

    def _make(self, request):
        body, id = request.json, f"prodjob_{len(self.made) + 1}"
        at = moment(len(self.made))
        state = {"id": "st", "state_transitioned_at": at, "current_state": "PENDING"}
        self.made[id] = {
            "id": id, "name": body["name"], "created_at": at, "status_updated_at": at, "creator_id": "usr_1",
            "config": body["config"], "state": state, "project_id": body["project_id"], "overview_url": "x",
            "is_service": False, "cloud_id": "cld_1", "last_job_run_id": f"run_{id}", "tags": body["tags"],
            "project": {"name": "default", "id": "prj_1", "directory_name": "d"},
            "creator": {"id": "usr_1", "name": "A", "username": "a", "email": "a@example.com"},
        }  # fmt: skip
        return result(self.made[id])

    def _show(self, request, id):
        return result(self.made[id]) if id in self.made else refused(404, "no such job")

    def _list(self, request):
        """Two jobs a page, the newest first, whose name contains what is asked for."""
        wanted = request.first("name") or ""
        found = [item for item in reversed(self.made.values()) if wanted in item["name"]]
        begin = int(request.first("paging_token") or 0)
        more = str(begin + 2) if begin + 2 < len(found) else None
        return Reply(body={"results": found[begin : begin + 2], "metadata": {"total": 9, "next_paging_token": more}})

    def _end(self, request, id):
        if self.made[id]["state"]["current_state"] in ("SUCCESS", "OUT_OF_RETRIES", "TERMINATED"):
            return refused(409, "the job has ended")
        self.made[id]["state"]["current_state"] = "TERMINATED"
        return result(self.made[id])

    def _show_runs(self, request):
        return Reply(body={"results": {id: [] for id in request.json["ha_job_ids"]}})

    def _show_log(self, request, id):
        chunk = {"cluster_id": "ses", "chunk_name": "c", "chunk_url": f"{self.url}/bucket/log", "size": 1,
                 "file_name": "f", "node_type": "head-node", "node_ip": "10.0.0.1", "instance_id": "i",
                 "session_id": "s"}  # fmt: skip
        return result({"log_chunks": [chunk], "next_page_token": None})

    def _sign_link(self, request, cloud):
        name = request.json["file_name"]
        link = f"{self.url}/bucket/{name}?X-Amz-Signature=s"
        return result({"file_uri": f"s3://bucket/{name}", "url": link, "file_exists": name in self.packages,
                       "bucket_name": "bucket", "bucket_path": name, "url_scheme": "HTTP"})  # fmt: skip

    def _take_package(self, request, name):
        self.packages[name] = request.body
        return Reply(body=b"")

    def _show_default(self, request, *_):
        return result(DEFAULTS[request.path.removeprefix("/ext/v0/").partition("/")[0]])

    def _show_user(self, request):
        return result({"id": "usr_1", "email": "a@example.com", "name": "A", "username": "a", "verified": True,
                       "organization_permission_level": "owner", "organization_ids": [], "organizations": [],
                       "ld_hash": "h", "ld_hash_fields": [], "pylon_hash": "h"})  # fmt: skip

    def _find_config(self, request):
        return Reply(body={"results": [TEMPLATE] if request.json["name"]["equals"] == "gpus" else [], "metadata": {}})


MADE = {"creator_id": "usr_1", "organization_id": "org_1", "created_at": BEGUN.isoformat(),
        "last_modified_at": BEGUN.isoformat(), "version": 1, "anonymous": False}  # fmt: skip
CLOUD = {"id": "cld_1", "name": "c", "provider": "AWS", "region": "r", "credentials": "c", "is_k8s": False, "is_aioa": False,
         "is_bring_your_own_resource": False, "type": "PRIVATE", "is_private_cloud": False, "is_private_service_cloud": False}  # fmt: skip
TEMPLATE = {**MADE, "id": "cpt_1", "name": "gpus", "config": {**CONFIG, "cloud": CLOUD},
            "creator": {"id": "usr_1", "name": "A", "username": "a", "email": "a@example.com"}}  # fmt: skip
DEFAULTS = {
    "clouds": {"id": "cld_1", "name": "c", "provider": "AWS", "region": "r", "credentials": "c", "type": "PRIVATE",
               "creator_id": "usr_1", "created_at": BEGUN.isoformat(), "is_default": True,
               "customer_aggregated_logs_config_id": "l"},
    "cluster_computes": {**MADE, "id": "cpt_1", "name": "gpus", "config": CONFIG},
    "projects": {"id": "prj_1", "name": "default", "cluster_config": "{}", "created_at": BEGUN.isoformat(),
                 "organization_id": "org_1", "is_default": True, "directory_name": "d", "description": "",
                 "cloud_id": "cld_1", "creator_id": "usr_1", "is_owner": True, "is_read_only": False,
                 "parent_cloud_id": "cld_1"},
    "cluster_environment_builds": {"id": "bld_1", "cluster_environment_id": "apt_1", "revision": 1, "status": "succeeded",
                                   "creator_id": "usr_1", "created_at": BEGUN.isoformat(), "is_byod": False,
                                   "last_modified_at": BEGUN.isoformat(), "docker_image_name": "anyscale/ray:2.60"},
    "cluster_environments": {"id": "apt_1", "name": "default", "organization_id": "org_1", "creator_id": "usr_1",
                             "created_at": BEGUN.isoformat(), "last_modified_at": BEGUN.isoformat(), "anonymous": False,
                             "is_default": True},
}  # fmt: skip
ROUTES = {
    ("GET", "/api/v2/userinfo/"): FakeConsole._show_user,
    ("POST", f"{JOB}/create"): FakeConsole._make,
    ("GET", f"{JOB}/"): FakeConsole._list,
    ("POST", f"{JOB}/job_runs/search"): FakeConsole._show_runs,
    ("GET", "/ext/v0/production_jobs/([^/]+)"): FakeConsole._show,
    ("POST", "/ext/v0/production_jobs/([^/]+)/terminate"): FakeConsole._end,
    ("GET", "/api/v2/logs/job_logs_download_v2/([^/]+)"): FakeConsole._show_log,
    ("POST", "/api/v2/clouds/([^/]+)/generate_cloud_data_bucket_presigned_url"): FakeConsole._sign_link,
    ("PUT", "/bucket/([^/]+)"): FakeConsole._take_package,
    ("GET", "/bucket/log"): lambda fake, request: Reply(body=fake.output.encode()),
    ("POST", "/api/v2/compute_templates/search"): FakeConsole._find_config,
    ("GET", "/api/v2/compute_templates/cpt_1"): lambda fake, request: result(TEMPLATE),
    ("GET", "/api/v2/projects/prj_1"): lambda fake, request: result(DEFAULTS["projects"]),
    ("GET", "/ext/v0/(clouds|cluster_computes|projects|cluster_environment_builds|cluster_environments)/(.*)"): (
        FakeConsole._show_default
    ),
}


def moment(seconds):
    return (BEGUN + timedelta(seconds=seconds)).isoformat()


def result(value):
    return Reply(body={"result": value})


def refused(status, detail):
    return Reply(status=status, body={"error": {"detail": detail}})
