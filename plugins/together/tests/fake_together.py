"""Together AI as its SDK 3.1.1 meets it, on this machine: files, jobs, events, metrics, checkpoints, archives."""

import hashlib
import io
import json
import re
import tarfile
from datetime import UTC, datetime

import zstandard
from luthier import JobState
from luthier.testing.loopback import Reply
from luthier_together import Together

STARTED = "2026-11-28T07:00:{:02d}Z"
ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA", "r": 8}',
    "adapter_model.safetensors": bytes(range(256)) * 400,
}


class FakeTogether:
    """What the kit asks of a fake stands first."""

    model = "meta-llama/Meta-Llama-3.1-8B-Instruct-Reference"
    create = ("POST", r"/v1/fine-tunes$")
    upload = ("PUT", r"/storage/")
    download = ("GET", r"/finetune/download$")
    signed = r"/storage/"  # what stands behind a signed link
    settings = {"num_train_epochs": 2.0, "learning_rate": 1e-5, "adapter": {"name": "lora", "r": 8}}
    states = {
        "pending": JobState.PENDING, "queued": JobState.PENDING, "running": JobState.RUNNING,
        "compressing": JobState.RUNNING, "uploading": JobState.RUNNING, "cancel_requested": JobState.RUNNING,
        "completed": JobState.COMPLETED, "error": JobState.FAILED, "cancelled": JobState.CANCELED,
    }  # fmt: skip

    def __init__(self):
        self.files, self.tunes, self.url = {}, {}, ""

    def options(self, url, key):
        self.url = url
        return Together(base_url=url, api_key=key)

    def jobs(self):
        return list(self.tunes)

    def set_state(self, id, raw):
        self.tunes[id]["status"] = raw

    def rows(self, id):
        """The lines that the job trains on."""
        return [json.loads(line) for line in self.files[self.tunes[id]["training_file"]]["content"].splitlines()]

    def answer(self, request):
        if request.path.startswith("/storage/"):
            return self.store(request)
        if not request.headers.get("authorization", "").startswith("Bearer "):
            return refused(401, "Missing API key")
        for (method, pattern), act in ROUTES.items():
            found = re.fullmatch(pattern, request.path)
            if method == request.method and found:
                return act(self, request, *found.groups())
        return refused(404, f"no {request.method} {request.path}")

    def store(self, request):
        if request.first("signature") != "ok":
            return Reply(status=403, body=b"expired")
        file = self.files[request.path.rpartition("/")[2]]
        if hashlib.sha256(request.body).hexdigest() != file["checksum"]:
            return Reply(status=400, body=b"checksum")
        file["content"] = request.body
        return Reply(body=b"")

    def begin_file(self, request):
        form = {name: value.decode() for name, value in request.form().items()}
        same = next(
            (i for i, f in self.files.items() if f["checksum"] == form["checksum"] and f["content"] is not None), None
        )
        if same:
            return Reply(status=409, body={"file_id": same, "error": {"message": "exists"}})
        id = f"file-{len(self.files) + 1}"
        self.files[id] = {**form, "content": None}
        link = f"{self.url}/storage/{id}?signature=ok&X-Amz-Expires=60"
        return Reply(status=302, headers={"location": link, "x-together-file-id": id}, body={})

    def show_file(self, request, id):
        if id not in self.files:
            return refused(404, "no such file")
        file = self.files[id]
        status = "PENDING" if file["content"] is None else "COMPLETED"
        return Reply(body={"id": id, "object": "file", "bytes": len(file["content"] or b""), "created_at": 1795848000,
                           "filename": file["file_name"], "FileType": "jsonl", "purpose": "fine-tune",
                           "processing_status": status, "Processed": status == "COMPLETED", "LineCount": 1})  # fmt: skip

    def make_tune(self, request):
        body = request.json
        if body.get("training_file") not in self.files or not body.get("model"):
            return refused(400, "training_file or model is missing")
        id = f"ft-{len(self.tunes) + 1}"
        name = f"someone/{body['model'].rpartition('/')[2]}-{body.get('suffix') or 'x'}"
        self.tunes[id] = {**body, "id": id, "status": "pending", "created_at": self.now(), "updated_at": self.now(),
                          "started_at": None, "user_id": "u", "model_output_name": name, "events": None,
                          "token_count": 1234, "total_price": 2_500_000_000, "sent": body}  # fmt: skip
        return self.show_tune(request, id)

    def now(self):
        return datetime.now(UTC).isoformat().replace("+00:00", "Z")

    def show_tune(self, request, id):
        if id not in self.tunes:
            return refused(404, "no such job")
        return Reply(body={k: v for k, v in self.tunes[id].items() if k not in ("sent", "suffix_sent")})

    def list_tunes(self, request):
        return Reply(body={"data": [{k: v for k, v in tune.items() if k != "sent"} for tune in self.tunes.values()]})

    def cancel_tune(self, request, id):
        if self.tunes[id]["status"] in ("completed", "error", "cancelled"):
            return refused(400, "the job has ended")
        self.tunes[id]["status"] = "cancelled"
        return self.show_tune(request, id)

    def list_events(self, request, id):
        kinds = [("job_pending", 0), ("training_start", 0), ("checkpoint_save", 2), ("epoch_complete", 4)]
        return Reply(body={"data": [
            {"object": "fine-tune-event", "created_at": STARTED.format(i), "level": None if i == 0 else "info", "message": kind,
             "type": kind, "step": step, "total_steps": 4, "param_count": 0, "token_count": 0, "wandb_url": "", "hash": ""}
            for i, (kind, step) in enumerate(kinds)
        ]})  # fmt: skip

    def list_metrics(self, request, id):
        begin = int(request.first("global_step_from") or 0)
        lines = [{"train/global_step": s, "train/loss": 4.0 / s, "train/learning_rate": 1e-5} for s in range(1, 5)]
        return Reply(body={"metrics": [line for line in lines if line["train/global_step"] >= begin]})

    def list_checkpoints(self, request, id):
        return Reply(
            body={
                "data": [{"step": 2, "path": "s3://x", "created_at": STARTED.format(3), "checkpoint_type": "adapter"}]
            }
        )

    def send_archive(self, request):
        if request.first("ft_id") not in self.tunes:
            return refused(404, "no such job")
        packed = zstandard.ZstdCompressor().compress(tar_of(ADAPTER))
        begin = int((request.headers.get("range") or "bytes=0-")[6:].split("-")[0])
        headers = {"content-type": "application/x-zstd", "etag": '"1"'}
        if begin:
            headers["content-range"] = f"bytes {begin}-{len(packed) - 1}/{len(packed)}"
        return Reply(body=packed[begin:], status=206 if begin else 200, headers=headers)

    def tell_price(self, request):
        return Reply(body={"estimation_available": True, "allowed_to_proceed": True, "estimated_total_price": 2.5,
                           "estimated_train_token_count": 5000, "estimated_eval_token_count": 0, "user_limit": 100.0})  # fmt: skip

    def tell_limits(self, request):
        lora = {"default_rank": 8, "max_batch_size": 64, "max_batch_size_dpo": 32, "max_rank": 64, "min_batch_size": 8,
                "target_modules": ["q_proj"]}  # fmt: skip
        return Reply(body={
            "default_gradient_accumulation_steps": 1, "lora_training": lora, "full_training": None, "max_learning_rate": 1.0,
            "max_num_checkpoints": 10, "max_num_epochs": 20, "max_num_evals": 100, "max_seq_length_dpo": 8192,
            "max_seq_length_sft": 8192, "merge_output_lora": True, "min_learning_rate": 0.0, "min_max_seq_length": 128,
            "min_num_epochs": 1, "model_name": self.model, "supports_full_training": False, "supports_reasoning": False,
            "supports_tools": True, "supports_vision": False})  # fmt: skip


ROUTES = {
    ("POST", "/v1/files"): FakeTogether.begin_file,
    ("GET", "/v1/files/([^/]+)"): FakeTogether.show_file,
    ("POST", "/v1/files/([^/]+)/preprocess"): FakeTogether.show_file,
    ("POST", "/v1/fine-tunes"): FakeTogether.make_tune,
    ("GET", "/v1/fine-tunes"): FakeTogether.list_tunes,
    ("POST", "/v1/fine-tunes/estimate-price"): FakeTogether.tell_price,
    ("GET", "/v1/fine-tunes/models/limits"): FakeTogether.tell_limits,
    ("GET", "/v1/fine-tunes/([^/]+)"): FakeTogether.show_tune,
    ("POST", "/v1/fine-tunes/([^/]+)/cancel"): FakeTogether.cancel_tune,
    ("GET", "/v1/fine-tunes/([^/]+)/events"): FakeTogether.list_events,
    ("GET", "/v1/fine-tunes/([^/]+)/metrics"): FakeTogether.list_metrics,
    ("GET", "/v1/fine-tunes/([^/]+)/checkpoints"): FakeTogether.list_checkpoints,
    ("GET", "/v1/finetune/download"): FakeTogether.send_archive,
}


def refused(status, message):
    return Reply(
        status=status,
        body={"error": {"message": message, "type": "invalid_request_error", "code": None, "param": None}},
    )


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
