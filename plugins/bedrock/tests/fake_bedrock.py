"""Bedrock and S3 as boto3 1.44.8 meets them, on this machine. Every signature is computed again with botocore's signer,
every request that makes a job is checked by botocore's own model of the service."""

import base64
import hashlib
import json
import re
from datetime import UTC, datetime

import botocore.session
from botocore.auth import S3SigV4QueryAuth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.validate import ParamValidator
from luthier import JobState
from luthier.jobs.secret import read_secret
from luthier.testing.loopback import Reply
from luthier_bedrock import Bedrock

ROLE = "arn:aws:iam::123456789012:role/Tuner"
FOLDER = "s3://my-bucket/luthier"
MODEL = "amazon.nova-micro-v1:0:128k"
SERVICE = botocore.session.Session().get_service_model("bedrock")
CREATE = SERVICE.operation_model("CreateModelCustomizationJob").input_shape
CSV = "step_number,epoch_number,training_loss,perplexity\n" + "".join(f"{s},0,{4 / s},9.5\n" for s in range(1, 5))


class FakeBedrock:
    """What the kit asks of a fake stands first."""

    model = MODEL
    create = ("POST", r"/model-customization-jobs$")
    upload = ("PUT", r"/my-bucket/luthier/rows/")
    download = None
    signed = r"/my-bucket/"
    settings = {"num_train_epochs": 2.0, "learning_rate": 1e-5}
    states = {
        "InProgress": JobState.RUNNING, "Stopping": JobState.RUNNING, "Completed": JobState.COMPLETED,
        "Failed": JobState.FAILED, "Stopped": JobState.CANCELED,
    }  # fmt: skip

    def __init__(self):
        self.objects, self.tunes, self.region, self.page = {}, {}, "us-east-1", 2
        self.secret, self.token = None, None
        self.wrong = []  # what was found wrong with requests

    def options(self, url, key):
        self.secret = self.token = read_secret(key, "fake").reveal()
        return Bedrock(base_url=url, s3_url=url, region=self.region, access_key_id="AKIDEXAMPLE", secret_access_key=key,
                       session_token=key, role_arn=ROLE, s3_folder=FOLDER)  # fmt: skip

    def jobs(self):
        return list(self.tunes)

    def set_state(self, id, raw):
        tune = self.tunes[id]
        tune["status"] = raw
        tune["statusDetails"] = {"validationDetails": {"status": "Completed", "lastModifiedTime": now()},
                                 "trainingDetails": {"status": "InProgress", "lastModifiedTime": now()}}  # fmt: skip
        if raw == "Completed":
            tune["outputModelArn"] = f"arn:aws:bedrock:{self.region}:123456789012:custom-model/{MODEL}/abcdefghijkl"
            tune |= {
                "trainingMetrics": {"trainingLoss": 1.0},
                "validationMetrics": [{"validationLoss": 1.5}],
                "endTime": now(),
            }
            place = tune["outputDataConfig"]["s3Uri"].removeprefix("s3://")
            folder = f"{place}model-customization-job-{tune['jobArn'].rpartition('/')[2]}/training_artifacts"
            self.objects[f"{folder}/step_wise_training_metrics.csv"] = CSV.encode()
            self.objects[f"{folder}/other.bin"] = b"x"

    def rows(self, id):
        place = self.tunes[id]["trainingDataConfig"]["s3Uri"].removeprefix("s3://")
        return [json.loads(line) for line in self.objects[place].splitlines()]

    def answer(self, request):
        if request.path.startswith("/my-bucket/"):
            return self.store(request)
        if not self.is_signed(request):
            return refused(403, "InvalidSignatureException", "the signature does not match")
        for (method, pattern), act in ROUTES.items():
            found = re.fullmatch(pattern, request.path)
            if method == request.method and found:
                return act(self, request, *found.groups())
        return refused(404, "ResourceNotFoundException", f"no {request.method} {request.path}")

    def is_signed(self, request):
        """Compute the signature of what arrived, by the headers that it names, and compare."""
        told = re.fullmatch(r"AWS4-HMAC-SHA256 Credential=(\S+), SignedHeaders=(\S+), Signature=(\w+)",
                            request.headers.get("authorization", ""))  # fmt: skip
        if not told or told[1].split("/")[2:4] != [self.region, "bedrock"]:
            return False
        headers = {name: request.headers[name] for name in told[2].split(";")}
        if self.token and headers.get("x-amz-security-token") != self.token:
            return False
        signer = SigV4Auth(Credentials("AKIDEXAMPLE", self.secret, self.token), "bedrock", self.region)
        return told[3] == self.compute(signer, request, headers, headers["x-amz-date"], request.query)

    def compute(self, signer, request, headers, date, query):
        params = {name: values[0] for name, values in query.items()}
        link = f"http://{request.headers['host']}{request.raw_path}"
        copy = AWSRequest(method=request.method, url=link, headers=headers, data=request.body, params=params)
        copy.context["timestamp"] = date
        return signer.signature(signer.string_to_sign(copy, signer.canonical_request(copy)), copy)

    def store(self, request):
        query = dict(request.query)
        (signature,) = query.pop("X-Amz-Signature", [""])
        headers = {name: request.headers[name] for name in query.get("X-Amz-SignedHeaders", [""])[0].split(";") if name}
        signer = S3SigV4QueryAuth(Credentials("AKIDEXAMPLE", self.secret, self.token), "s3", self.region)
        date = query.get("X-Amz-Date", [""])[0]
        if not signature or signature != self.compute(signer, request, headers, date, query):
            return Reply(status=403, body=b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
        place = request.path.removeprefix("/")
        if request.method == "PUT":
            told = base64.b64encode(hashlib.sha256(request.body).digest()).decode()
            if headers.get("x-amz-checksum-sha256") != told:
                return Reply(status=400, body=b"<Error><Code>BadDigest</Code></Error>")
            self.objects[place] = request.body
            return Reply(body=b"")
        if request.first("list-type") == "2":
            return self.list_objects(request)
        if place not in self.objects:
            return Reply(status=404, body=b"<Error><Code>NoSuchKey</Code></Error>")
        return Reply(body=self.objects[place])

    def list_objects(self, request):
        keys = [k.partition("/")[2] for k in self.objects if k.partition("/")[2].startswith(request.first("prefix"))]
        begin = int(request.first("continuation-token") or 0)
        lines = "".join(
            f"<Contents><Key>{k}</Key><Size>{len(self.objects[f'my-bucket/{k}'])}</Size></Contents>"
            for k in keys[begin : begin + 1]
        )
        more = f"<NextContinuationToken>{begin + 1}</NextContinuationToken>" if begin + 1 < len(keys) else ""
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        return Reply(body=f'<ListBucketResult xmlns="{space}">{lines}{more}</ListBucketResult>'.encode())

    def make_tune(self, request):
        body = request.json
        problems = ParamValidator().validate(body, CREATE).generate_report()
        problems += "".join(wrong_patterns(body, CREATE))
        if problems:
            self.wrong.append(problems)
            return refused(400, "ValidationException", problems)
        place = body["trainingDataConfig"]["s3Uri"].removeprefix("s3://")
        if place not in self.objects:
            return refused(400, "ValidationException", "there are no rows")
        name = body["jobName"]
        same = next((t for t in self.tunes.values() if t["clientRequestToken"] == body.get("clientRequestToken")), None)
        if same:
            return Reply(status=201, body={"jobArn": same["jobArn"]})
        if name in self.tunes:
            return refused(400, "ConflictException", "a job of this name exists")
        number = f"{len(self.tunes):012d}"
        arn = f"arn:aws:bedrock:{self.region}:123456789012:model-customization-job/{MODEL}/{number}"
        base = f"arn:aws:bedrock:{self.region}::foundation-model/{MODEL}"
        self.tunes[name] = {**body, "jobArn": arn, "status": "InProgress", "baseModelArn": base, "creationTime": now(),
                            "outputModelName": body["customModelName"], "failureMessage": "Failure Message",
                            "validationDataConfig": body.get("validationDataConfig", {"validators": []}),
                            "statusDetails": {"trainingDetails": {"status": "NotStarted"}}}  # fmt: skip
        return Reply(status=201, body={"jobArn": arn})

    def find_tune(self, id):
        return next((t for t in self.tunes.values() if id in (t["jobName"], t["jobArn"])), None)

    def show_tune(self, request, id):
        tune = self.find_tune(id)
        return refused(404, "ResourceNotFoundException", "no such job") if tune is None else Reply(body=tune)

    def list_tunes(self, request):
        begin, most = int(request.first("nextToken") or 0), min(self.page, int(request.first("maxResults") or 100))
        newest = list(self.tunes.values())[::-1]
        kept = ("jobArn", "jobName", "baseModelArn", "status", "statusDetails", "creationTime", "endTime")
        items = [{k: tune[k] for k in kept if k in tune} for tune in newest[begin : begin + most]]
        more = {"nextToken": str(begin + most)} if begin + most < len(newest) else {}
        return Reply(body={"modelCustomizationJobSummaries": items, **more})

    def stop_tune(self, request, id):
        tune = self.find_tune(id)
        if tune["status"] not in ("InProgress", "Stopping"):
            return refused(400, "ConflictException", "the job has ended")
        tune["status"] = "Stopping"
        return Reply(body={})


ROUTES = {
    ("POST", "/model-customization-jobs"): FakeBedrock.make_tune,
    ("GET", "/model-customization-jobs"): FakeBedrock.list_tunes,
    ("GET", "/model-customization-jobs/(.+)"): FakeBedrock.show_tune,
    ("POST", "/model-customization-jobs/(.+)/stop"): FakeBedrock.stop_tune,
}


def now():
    return datetime.now(UTC).isoformat()


def wrong_patterns(value, shape, where="body"):
    """What the model's patterns refuse, which botocore's validator does not look at."""
    if shape.type_name == "structure":
        for name, inner in value.items():
            yield from wrong_patterns(inner, shape.members[name], f"{where}.{name}")
    elif shape.type_name == "list":
        for inner in value:
            yield from wrong_patterns(inner, shape.member, where)
    elif shape.type_name == "string":
        pattern, names = shape.metadata.get("pattern"), shape.metadata.get("enum")
        if (pattern and not re.fullmatch(pattern, value)) or (names and value not in names):
            yield f"{where}: {value!r}\n"


def refused(status, code, message):
    return Reply(status=status, body={"message": message}, headers={"x-amzn-errortype": f"{code}:http://internal/"})
