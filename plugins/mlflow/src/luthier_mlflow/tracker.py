"""The callback `mlflow`: it sends every number of metrics.jsonl to an MLflow run, with the recipe as parameters."""

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

from luthier import LuthierError, event, get_logger

from luthier_mlflow import Mlflow

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by the client when it is imported

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
except ImportError as error:
    raise LuthierError("dependency-missing", f"MLflow's client cannot be imported: {error}", where="callback 'mlflow'",
                       remedy="Run: pip install luthier-mlflow mlflow-skinny") from error  # fmt: skip

PLACE: Final = "callback 'mlflow'"
THEN: Final = "training goes on without this tracker"
PARAMETERS_PER_REQUEST: Final = 100  # MLflow refuses more
DATABASES: Final = ("sqlite", "postgresql", "mysql", "mssql")

log = get_logger()


class Tracker:
    """The callback that sends to one MLflow run, on rank 0.

    A run that cannot be opened is an error before the first step. A later failure is logged once, and training
    continues without the tracker.
    """

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
        """Return the id of the MLflow run, with which a resumed run continues it."""
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
        """Create an MLflow run with its name, tags and parameters, and return its id."""
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
        """Return the id of the open run. There is one wherever there is a client."""
        assert self.mlflow_id is not None
        return self.mlflow_id

    def _try(self, during: str, act: Callable[[MlflowClient], Any]) -> None:
        """Call `act` with the client, if there is one. A failure is logged, and ends the tracker."""
        if self.client is None:
            return
        try:
            act(self.client)
        except Exception as error:
            self.client = None
            log.error("tracker_failed", tracker="mlflow", during=during, error=said(error), then=THEN)


def address(options: Mlflow) -> str | None:
    """Return the address of the store, or None for the run's own folder."""
    return options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None


def is_database(where: str) -> bool:
    return urlsplit(where).scheme.partition("+")[0] in DATABASES  # mysql+pymysql


def require_database() -> None:
    """Raise `dependency-missing` if the libraries for a database are not installed.

    The database is not opened here, because every rank would create it.
    """
    try:
        importlib.import_module("sqlalchemy")
        importlib.import_module("alembic")
    except ImportError as error:
        raise LuthierError("dependency-missing", f"a local store needs a library: {error}", where=PLACE,
                           remedy="Run: pip install luthier-mlflow sqlalchemy alembic") from error  # fmt: skip


def connected(where: str) -> MlflowClient:
    """Return a client of this address. A database is opened or created, a server not asked yet."""
    try:
        return MlflowClient(where)
    except Exception as error:
        raise refusal(error) from error


def experiment_id(client: MlflowClient, name: str) -> str:
    """Return the id of this experiment, created if necessary. Another run may create it at the same moment."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return experiment.experiment_id


def continued(client: MlflowClient, mlflow_id: str | None) -> str | None:
    """Set the run of a checkpoint to running and return its id, or None if the store does not have it."""
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
    """Yield a recipe as MLflow's parameters: dotted names of allowed characters, lists as JSON, None as `none`."""
    for name, value in settings.items():
        key = prefix + re.sub(r"[^\w\- ]", "_", str(name))
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{key}.")
        elif isinstance(value, str):
            yield Param(key, value)
        else:
            yield Param(key, "none" if value is None else json.dumps(value, default=str))


def refusal(error: Exception) -> LuthierError:
    """Return the error that says why no run can be opened."""
    remedy = "Check tracking_uri, experiment_name and credentials; sqlite:///PATH needs no server."
    return LuthierError("part-unsupported", f"no run could be opened: {said(error)}", where=PLACE, remedy=remedy)


def said(error: Exception) -> str:
    """Return type and text of an error, on one line."""
    return redacted(f"{type(error).__name__}: {' '.join(str(error).split())}")


def redacted(text: str) -> str:
    """Return the text without user and password in its addresses."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)
