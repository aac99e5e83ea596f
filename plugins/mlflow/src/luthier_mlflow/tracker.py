"""The callback `mlflow`: every number of metrics.jsonl in one MLflow run, the recipe as its parameters."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from luthier import LuthierError, event

from luthier_mlflow import Mlflow

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by the client when it is imported

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
except ImportError as error:
    raise LuthierError("dependency-missing", f"its client cannot be imported: {error}", where="callback 'mlflow'",
                       remedy="Run: pip install luthier-mlflow mlflow-skinny") from error  # fmt: skip

PLACE: Final = "callback 'mlflow'"
THEN: Final = "training goes on without this tracker"
PARAMETERS_PER_REQUEST: Final = 100  # more are refused
DATABASES: Final = ("sqlite", "postgresql", "mysql", "mssql")

log = structlog.get_logger()


class Tracker:
    """Sends to one MLflow run, on rank 0. What keeps it from being opened is an error before the first step; what fails
    later is logged once, and training goes on without the tracker."""

    def __init__(self, options: Mlflow) -> None:
        self.options = options
        self.mlflow_id: str | None = None
        self.client: MlflowClient | None = None
        given = address(options)
        if given is None or is_database(given):
            require_database()
        else:
            connected(given)

    @event
    def run_started(self, run: Any) -> None:
        self._open(run)

    @event
    def resumed(self, run: Any) -> None:
        self._open(run)

    @event
    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send("logged", step, metrics)

    @event
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send("evaluated", step, metrics)

    @event
    def stopped(self, reason: str) -> None:
        self._end("stopped", "KILLED", f"stopped: {reason}")

    @event
    def completed(self) -> None:
        self._end("completed", "FINISHED", "completed")

    @event
    def failed(self, error: BaseException) -> None:
        self._end("failed", "FAILED", f"failed: {getattr(error, 'code', type(error).__name__)}")

    def state(self) -> dict[str, Any]:
        """The MLflow run's id, by which a resumed run goes on with it."""
        return {"mlflow_id": self.mlflow_id}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.mlflow_id = state["mlflow_id"]

    def _open(self, run: Any) -> None:
        if not run.is_main:
            return
        os.makedirs(run.folder, exist_ok=True)
        where = address(self.options) or f"sqlite:///{run.folder.resolve().as_posix()}/mlflow.db"
        client = connected(where)
        try:
            self.mlflow_id = continued(client, self.mlflow_id) or self._create(client, run)
        except Exception as error:
            raise refusal(error) from error
        self.client = client
        log.info("tracker_opened", tracker="mlflow", id=self.mlflow_id, address=redacted(where))

    def _create(self, client: MlflowClient, run: Any) -> str:
        """A new MLflow run with its name, tags and parameters; its id."""
        name = self.options.experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        tags = {**self.options.tags, "luthier.run_id": run.run_id}
        made = client.create_run(experiment_id(client, name), run_name=self.options.run_name or run.name, tags=tags)
        parameters = iter(flat(run.settings))
        while some := list(itertools.islice(parameters, PARAMETERS_PER_REQUEST)):
            client.log_batch(made.info.run_id, params=some)
        return made.info.run_id

    def _send(self, during: str, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)  # milliseconds
        self._try(during, lambda client: client.log_batch(
            self._id(), metrics=[Metric(name, value, now, step) for name, value in metrics.items()]))  # fmt: skip

    def _end(self, during: str, status: str, words: str) -> None:
        self._try(during, lambda client: client.set_tag(self._id(), "luthier.status", words))
        self._try(during, lambda client: client.set_terminated(self._id(), status=status))

    def _id(self) -> str:
        """Return the id of the run that is open, as it is wherever there is a client."""
        assert self.mlflow_id is not None
        return self.mlflow_id

    def _try(self, during: str, act: Callable[[MlflowClient], Any]) -> None:
        """Let `act` work with the client, if there is one; a failure is logged and is the tracker's last."""
        if self.client is None:
            return
        try:
            act(self.client)
        except Exception as error:
            self.client = None
            log.error("tracker_failed", tracker="mlflow", during=during, error=said(error), then=THEN)


def address(options: Mlflow) -> str | None:
    """Where the store is, or None for the run's own folder."""
    return options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None


def is_database(where: str) -> bool:
    return urlsplit(where).scheme.partition("+")[0] in DATABASES  # mysql+pymysql


def require_database() -> None:
    """Raise `dependency-missing` where what the slim client needs for a database is not installed. The database is not
    opened here: it would be made, once for each rank."""
    try:
        importlib.import_module("sqlalchemy")
        importlib.import_module("alembic")
    except ImportError as error:
        raise LuthierError("dependency-missing", f"a local store needs a library: {error}", where=PLACE,
                           remedy="Run: pip install luthier-mlflow sqlalchemy alembic") from error  # fmt: skip


def connected(where: str) -> MlflowClient:
    """A client of this address; a server is not asked yet, a database is opened and made if need be."""
    try:
        return MlflowClient(where)
    except Exception as error:
        raise refusal(error) from error


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the experiment of this name, made if it is not there; another run may make it at the same moment."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def continued(client: MlflowClient, mlflow_id: str | None) -> str | None:
    """The id of the run of a checkpoint, running again; None where there is none, or where the store has lost it."""
    if mlflow_id is None:
        return None
    try:
        client.update_run(mlflow_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("tracker_run_missing", tracker="mlflow", id=mlflow_id, then="a new run is begun")
        return None
    return mlflow_id


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[Param]:
    """A recipe as MLflow's parameters: dotted names of the characters it allows, lists as JSON, none as `none`."""
    for name, value in settings.items():
        key = prefix + re.sub(r"[^\w\- ]", "_", str(name))
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{key}.")
        elif isinstance(value, str):
            yield Param(key, value)
        else:
            yield Param(key, "none" if value is None else json.dumps(value, default=str))


def refusal(error: Exception) -> LuthierError:
    """Why no run can be opened, for the user."""
    remedy = "Check tracking_uri, experiment_name and credentials; sqlite:///PATH needs no server."
    return LuthierError("part-unsupported", f"no run could be opened: {said(error)}", where=PLACE, remedy=remedy)


def said(error: Exception) -> str:
    """An error's type and text, on one line."""
    return redacted(f"{type(error).__name__}: {' '.join(str(error).split())}")


def redacted(text: str) -> str:
    """The text without user and password in its addresses."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)
