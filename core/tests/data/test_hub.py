"""Hub datasets through the real client, against a hub of one dataset on this machine."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

SHA, OID = "a" * 40, "b" * 40
ROWS = [{"question": "2 + 3?", "answer": "5"}, {"question": "é?", "answer": "漢"}]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LISTED = [{"type": "file", "path": "train.jsonl", "size": len(CONTENT), "oid": OID}]
SEEN: list[str] = []


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does for the dataset org/rows; anything else is not there."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        SEEN.append(path)
        about = {"id": "org/rows", "sha": SHA, "private": False, "tags": [], "siblings": [{"rfilename": "train.jsonl"}]}
        if path.endswith("/train.jsonl"):
            self.answer(CONTENT, {"ETag": f'"{OID}"', "X-Repo-Commit": SHA})
        elif path == f"/api/datasets/org/rows/tree/{SHA}":
            self.answer(json.dumps(LISTED).encode())
        elif path in ("/api/datasets/org/rows", f"/api/datasets/org/rows/revision/{SHA}"):
            self.answer(json.dumps(about).encode())
        else:
            self.answer(b"", {"X-Error-Code": "RepoNotFound" if "org/rows" not in path else "EntryNotFound"}, 404)

    do_HEAD = do_GET

    def answer(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


SOURCES = {
    "rows": {"path": "org/rows", "columns": {"prompt": "question", "completion": "answer"}},
    "no dataset": {"path": "org/nothing"},
    "no split": {"path": "org/rows", "split": "nothing"},
}
CODE = """
import json, sys
from luthier import LuthierError
from luthier.data.read.sources import read_source
from luthier.data.stream.stream_units import source_units
from luthier.recipe.schema import Source

def answer(options):
    try:
        return [[row.values, row.where] for row in read_source(Source(**options))]
    except LuthierError as error:
        return error.to_dict()

def streamed(options):
    try:
        (unit,) = source_units(Source(**options), None, "paragraph")
        return [[row.values, row.where] for skip in (0, 1) for row in unit.rows(skip)]
    except LuthierError as error:
        return error.to_dict()

given = json.loads(sys.argv[1])
found = {name: answer(options) for name, options in given.items()}
found |= {f"{name}, streamed": streamed(options) for name, options in given.items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each source gives, read in a process of its own, for the client takes its address when imported."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "NO_PROXY": "*",
    }
    command = [sys.executable, "-c", CODE, json.dumps(SOURCES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_hub_dataset_gives_its_rows_with_columns_mapped(found):
    assert found["rows"] == [
        [{"prompt": "2 + 3?", "completion": "5"}, "org/rows/train[0]"],
        [{"prompt": "é?", "completion": "漢"}, "org/rows/train[1]"],
    ]
    assert any(path.endswith(f"/{SHA}/train.jsonl") for path in SEEN)


def test_a_hub_dataset_is_streamed_from_any_row_on(found):
    (first, second) = found["rows"]
    assert found["rows, streamed"] == [first, second, second]


@pytest.mark.parametrize("name", ["no dataset", "no split", "no dataset, streamed", "no split, streamed"])
def test_a_dataset_or_split_that_the_hub_has_not_is_an_error(found, name):
    error = found[name]
    assert error["code"] == "data-not-found" and error["where"] == SOURCES[name.removesuffix(", streamed")]["path"]
    assert "split" in error["message"]


OFFLINE = """
import json, time
from luthier import LuthierError
from luthier.data.read.sources import read_source
from luthier.model.load import model_location
from luthier.recipe.schema import Source

found = []
for ask in (lambda: model_location("org/nothing"), lambda: list(read_source(Source(path="org/nothing")))):
    try:
        ask()
    except LuthierError as error:
        found.append([error.code, error.problem])
print(json.dumps(found))
"""


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path):
    with socket.socket() as taken:  # a port at which nobody listens
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        environment = {
            k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "HF_HUB_OFFLINE"
        }
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [code for code, _ in found] == ["model-not-found", "data-not-found"]
    assert all(f"the hub at {endpoint} cannot be reached" in problem for _, problem in found)
    assert "Retrying" not in done.stderr
