"""A run, its events fired as the engine fires them, and a reader of Trackio's local store, which is a temporary folder."""

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch
from luthier.plugins.events import Events
from luthier.plugins.registry import Plugins
from luthier.runs.writing.active_run import ActiveRun

STORE = tempfile.TemporaryDirectory(prefix="luthier-trackio-")
os.environ["TRACKIO_DIR"] = STORE.name  # the library reads it once, when it is imported

torch.set_num_threads(1)

SETTINGS = {"adapter": {"name": "lora", "r": 16}, "learning_rate": 2e-4, "exact_callbacks": ["jsonl"], "merge": None}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without the addresses and tokens of the user who runs the tests."""
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WRITE_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> ActiveRun:
    return ActiveRun(run_id="r-1", folder=tmp_path / "run", name="first", settings=SETTINGS, total_steps=9)


@pytest.fixture
def project() -> str:
    """The name of a project that no other test has."""
    return f"p{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """The callback, built from the installed plugin."""
    plugins = Plugins()
    offer = plugins.get("callback", "trackio")
    return lambda **options: plugins.build(offer, offer.record.options(**options))


@pytest.fixture(scope="session")
def hooks() -> Callable[[Any], Any]:
    """The hooks of a manager that holds a callback, as the engine makes it."""

    def hooks(callback: Any) -> Any:
        manager = pluggy.PluginManager("luthier-events")
        manager.add_hookspecs(Events)
        manager.register(callback, "trackio")
        manager.check_pending()
        return manager.hook

    return hooks


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[tuple[int, dict[str, Any]]]]:
    """The rows of a run in the store, (step, metrics) in their order, read by the library itself."""

    def rows_of(project: str, run_id: str) -> list[tuple[int, dict[str, Any]]]:
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(project, run_id=run_id)
        return [(row["step"], {k: v for k, v in row.items() if k not in ("step", "timestamp")}) for row in rows]

    return rows_of


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the library's own server, on the loopback, over the same store; its token is in the environment."""
    from trackio.launch import launch_trackio_dashboard
    from trackio.server import TrackioDashboardApp, build_starlette_app_only

    app, token = build_starlette_app_only(mcp_server=False)
    url, _, _, process = launch_trackio_dashboard(app, share=False, quiet=True)
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", token)
    yield url
    TrackioDashboardApp(app, process, token).close()
