"""A run, its events fired as the engine fires them, a local store, and a small tracking server."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pluggy
import pytest
import torch
from luthier.plugins.events import Events
from luthier.plugins.registry import Plugins
from luthier.runs.writing.active_run import ActiveRun

torch.set_num_threads(1)

SETTINGS = {"adapter": {"name": "lora", "r": 16}, "learning_rate": 2e-4, "exact_callbacks": ["jsonl"], "merge": None}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without the address and credentials of the user who runs the tests, which gives up at once."""
    for name in ("TRACKING_URI", "TRACKING_USERNAME", "TRACKING_PASSWORD", "TRACKING_TOKEN", "EXPERIMENT_NAME"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> ActiveRun:
    return ActiveRun(run_id="r-1", folder=tmp_path / "run", name="first", settings=SETTINGS, total_steps=9)


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """The callback, built from the installed plugin."""
    plugins = Plugins()
    offer = plugins.get("callback", "mlflow")
    return lambda **options: plugins.build(offer, offer.record.options(**options))


@pytest.fixture(scope="session")
def hooks() -> Callable[[Any], Any]:
    """The hooks of a manager that holds a callback, as the engine makes it."""

    def hooks(callback: Any) -> Any:
        manager = pluggy.PluginManager("luthier-events")
        manager.add_hookspecs(Events)
        manager.register(callback, "mlflow")
        manager.check_pending()
        return manager.hook

    return hooks


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of one SQLite store for all tests: MLflow takes a second to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


class Recorded:
    """What a store holds of one run."""

    def __init__(self, store: str, run_id: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(store)
        self.run = self.client.get_run(run_id)
        self.params, self.tags = self.run.data.params, self.run.data.tags
        self.status, self.name = self.run.info.status, self.run.info.run_name

    @property
    def experiment(self) -> str:
        return self.client.get_experiment(self.run.info.experiment_id).name

    @property
    def points(self) -> dict[tuple[str, int], float]:
        names = self.run.data.metrics
        return {
            (name, m.step): m.value
            for name in names
            for m in self.client.get_metric_history(self.run.info.run_id, name)
        }


@pytest.fixture(scope="session")
def recorded(store: str) -> Callable[..., Recorded]:
    """What the store holds of the run that a callback opened."""
    return lambda callback, where=store: Recorded(where, callback.state()["mlflow_id"])


class Server(ThreadingHTTPServer):
    """As much of a tracking server as one run needs, on a free loopback port."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str | None] = set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, act: str) -> dict[str, Any]:
        info = {"run_id": "served1", "run_name": "first", "experiment_id": "7", "status": "RUNNING"}
        return {
            "experiments/get-by-name": {"experiment": {"experiment_id": "7", "name": "Default"}},
            "runs/create": {"run": {"info": info, "data": {}}},
            "runs/update": {"run_info": info},
        }.get(act, {})


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        act = urlsplit(self.path).path.removeprefix("/api/2.0/mlflow/")
        self.server.asked.append((act, json.loads(body or b"{}")))
        self.server.keys.add(self.headers.get("authorization"))
        answer = json.dumps(self.server.answer(act)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()
