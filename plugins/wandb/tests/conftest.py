"""A run, its events fired as the engine fires them, and a reader of the client's offline files."""

import gzip
import json
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch
import wandb
from luthier.plugins.events import Events
from luthier.plugins.registry import Plugins
from luthier.runs.writing.active_run import ActiveRun
from wandb.proto.wandb_internal_pb2 import Record

torch.set_num_threads(1)

SETTINGS = {"adapter": {"name": "lora", "r": 16}, "learning_rate": 2e-4, "seed": 0}
BLOCK = 32768  # the client's files are LevelDB logs: blocks of records of (checksum, length, type)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client without key, settings or folders of the user who runs the tests."""
    for name in ("API_KEY", "BASE_URL", "ENTITY", "MODE", "NAME", "NOTES", "PROJECT", "RUN_GROUP", "TAGS", "DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "client"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fresh() -> Iterator[None]:
    """A client that reads its environment anew, in this test and after it."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def run(tmp_path: Path) -> ActiveRun:
    return ActiveRun(run_id="r-1", folder=tmp_path / "run", name="first", settings=SETTINGS, total_steps=9)


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """The callback, built from the installed plugin."""
    plugins = Plugins()
    offer = plugins.get("callback", "wandb")
    return lambda **options: plugins.build(offer, offer.record.options(**options))


@pytest.fixture(scope="session")
def hooks() -> Callable[[Any], Any]:
    """The hooks of a manager that holds a callback, as the engine makes it."""

    def hooks(callback: Any) -> Any:
        manager = pluggy.PluginManager("luthier-events")
        manager.add_hookspecs(Events)
        manager.register(callback, "wandb")
        manager.check_pending()
        return manager.hook

    return hooks


class Recorded:
    """What an offline file holds: the run's record, its rows by step, its config and summary, its exit code."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.summary: dict[str, str] = {}
        self.exit_code: int | None = None
        for data in records(path.read_bytes()):
            self._take(Record.FromString(data))

    def _take(self, record: Record) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.run = record.run
            self.config = {c.key or c.nested_key[0]: c.value_json for c in record.run.config.update}
        elif kind == "history":
            row = {i.key or i.nested_key[0]: float(i.value_json) for i in record.history.item}
            self.rows[record.history.step.num] = {k: v for k, v in row.items() if not k.startswith("_")}
        elif kind == "summary":
            self.summary.update({i.key or i.nested_key[0]: i.value_json for i in record.summary.update})
        elif kind == "exit":
            self.exit_code = record.exit.exit_code


def records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind the client's seven bytes of header."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield whole
            whole = b""


@pytest.fixture(scope="session")
def recorded() -> Callable[[Path], list[Recorded]]:
    """The offline files under a folder, oldest first, each read once its last record is there: the client's service
    may still be writing when `finish` returns."""

    def recorded(folder: Path) -> list[Recorded]:
        deadline = time.monotonic() + 20
        while True:
            found = [Recorded(p) for p in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]
            if all(each.exit_code is not None for each in found):
                return found
            assert time.monotonic() < deadline

    return recorded


class Server(ThreadingHTTPServer):
    """As much of a W&B server as the client needs to open, feed and finish a run, on a free loopback port."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.opened: list[dict[str, Any]] = []  # what each request to open or update a run said
        self.rows: list[dict[str, Any]] = []  # of the run's history
        self.exit_codes: list[int] = []
        self.keys: set[str] = set()  # of the authorization header
        self.held: int | None = None  # the last step of the run that is resumed
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that is ended drops its connections
            super().handle_error(request, client_address)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/graphql":
            return {"data": self.data(body.get("operationName"), body.get("variables") or {})}
        if path.endswith("/file_stream"):
            content = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.rows += [json.loads(line) for line in content]
            self.exit_codes += [body["exitcode"]] if body.get("complete") else []
        return {}

    def data(self, operation: str | None, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "UpsertBucket":
            self.opened.append(variables)
            project = {"id": "UA==", "name": variables["project"], "entity": {"id": "RQ==", "name": "team"}}
            bucket = {"id": "QnVja2V0", "name": variables["name"], "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        if operation == "RunResumeStatus" and self.held is not None:
            project = {"id": "UA==", "name": "p", "entity": {"id": "RQ==", "name": "team"}}
            last = json.dumps({"_step": self.held, "_runtime": 3})
            counts = dict.fromkeys(("logLineCount", "eventsLineCount"), 0) | {"historyLineCount": self.held + 1}
            tails = {"historyTail": json.dumps([last]), "eventsTail": json.dumps([last]), "summaryMetrics": last}
            bucket = {
                "id": "QnVja2V0",
                "name": variables["name"],
                "config": "{}",
                "wandbConfig": '{"t": 1}',
                "tags": [],
            }
            return {"model": {**project, "bucket": {**bucket, **counts, **tails}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        if self.path == "/graphql":
            self.server.keys.add(self.headers.get("authorization", ""))
        json_body = self.command == "POST" and self.path != "/upload"
        answer = json.dumps(self.server.answer(self.path, json.loads(body) if json_body else {})).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()
